"""What a failed download from the Hugging Face Hub means, and what to do about it."""

from __future__ import annotations

import errno
from collections.abc import Iterator

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def cause_and_remedy(error: BaseException, kind: str, cache: str) -> str:
    """Returns a sentence for an error of `huggingface_hub`, or of what it stands on: httpx, the disk, hf_xet.

    kind: model or dataset. cache: the folder that files are downloaded to.
    """
    chain = list(_chain(error))
    for cause in chain:
        if (known := _known(cause, kind, cache)) is not None:
            return known
    root = chain[-1]
    return (
        f"the download broke off, or the Hub cannot be reached from here ({_named(root)}). Run the command again, "
        "which keeps what is downloaded already; on a machine that does not reach the Hub, fetch it on one that does "
        "and shares the cache (HF_HOME), or give the path of a copy"
    )


def disk_problem(error: BaseException, folder: str) -> str | None:
    """Returns a sentence if the error, or one that caused it, is a full disk or a folder that refuses files."""
    for cause in _chain(error):
        number = cause.errno if isinstance(cause, OSError) else None
        if number in _DISK_FULL:
            return f"the disk of {folder} is full. Make room, or set HF_HOME to a folder on another disk"
        if number in _REFUSED:
            return f"{folder} cannot be written ({_named(cause)}). Set HF_HOME to a folder of your own"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _known(error: BaseException, kind: str, cache: str) -> str | None:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return (
            f"the Hub gives this {kind} to those who accepted its terms. Accept them on its page, then `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"the Hub has no such {kind}, or shows it to others only. Correct the path or the id; for a private one, "
            "`hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the {kind} has no such revision. Correct what follows the @"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so that nothing is downloaded. Unset it, or fetch on another machine"
    if isinstance(error, HfHubHTTPError):
        return _by_status(getattr(error.response, "status_code", 0), kind)
    return disk_problem(error, cache)


def _by_status(status: int, kind: str) -> str | None:
    if status in (401, 403):
        return (
            f"the Hub refuses access ({status}). Log in with `hf auth login`, with an account that may read this {kind}"
        )
    if status == 404:
        return f"the Hub has no such {kind}, revision or file (404). Correct the id"
    if status == 429:
        return "the Hub limits the rate of requests (429). Wait some minutes, or log in with `hf auth login`"
    if status >= 500:
        return f"the Hub has a problem of its own ({status}). Try again later"
    return None


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
