"""Model folders with code of their own: refused with the file, never run, and nobody is asked."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rl.data.countdown.model import build_tokenizer
from megatron_rl.data.tokenizer import load_tokenizer
from megatron_rl.errors import UserError
from megatron_rl.models.hf_format import read_config
from megatron_rl.models.own_code import refuse_own_code

MODULE = "from pathlib import Path\nPath(__file__).with_name('it-ran').touch()\nclass Own: pass\n"
MAPS: dict[str, tuple[str, object]] = {
    "configuration": ("config.json", {"AutoConfig": "own.Own"}),
    "model": ("config.json", {"AutoModelForCausalLM": "own.Own"}),
    "another repository": ("config.json", {"AutoModelForCausalLM": "someone/else--own.Own"}),
    "tokenizer": ("tokenizer_config.json", {"AutoTokenizer": ["own.Own", None]}),
    "fast tokenizer": ("tokenizer_config.json", {"AutoTokenizer": [None, "own.Own"]}),
    "old form": ("tokenizer_config.json", ["own.Own", None]),
}


def folder_with(folder: Path, name: str, *, known: bool) -> Path:
    """A folder with a tokenizer, a model type that transformers knows or not, and code of its own."""
    build_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3" if known else "own-type"}))
    (folder / "own.py").write_text(MODULE)
    file, entries = MAPS[name]
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | {"auto_map": entries}))
    return folder


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_a_folder_that_wants_to_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, known: bool
) -> None:
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a question on the terminal"))
    folder = folder_with(tmp_path / "model", name, known=known)
    file = MAPS[name][0].replace(".", r"\.")
    for read in (load_tokenizer, read_config, refuse_own_code):
        with pytest.raises(UserError, match=rf"{file} wants to run code of its own \(.*own\.Own.*auto_map"):
            read(folder)
    assert not (folder / "it-ran").exists()


@pytest.mark.parametrize("text", ["{", "[]", "3", "[" * 100_000, '{"auto_map": {}}', '{"auto_map": null}', "{}"])
def test_a_folder_without_such_classes_is_accepted(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    refuse_own_code(tmp_path)


@pytest.mark.parametrize("name", ["model", "tokenizer"])
def test_the_tokenizer_never_waits_for_an_answer(tmp_path: Path, name: str) -> None:
    """Even without the check, as for a file that this version does not know of: `y` waits on the terminal."""
    folder = folder_with(tmp_path / "model", name, known=False)
    script = (
        "import sys; from pathlib import Path; import megatron_rl.data.tokenizer as t\n"
        "t.refuse_own_code = lambda folder: None\n"
        "try: t.load_tokenizer(Path(sys.argv[1]))\n"
        "except t.UserError as error: print('refused', error)\n"
        "print('left', sys.stdin.read())"
    )
    done = subprocess.run([sys.executable, "-c", script, folder], input="y\n", capture_output=True, text=True)
    assert "left y" in done.stdout, done.stderr
    assert not (folder / "it-ran").exists()
