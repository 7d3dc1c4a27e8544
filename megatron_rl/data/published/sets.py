"""Facts about each published set: its columns in every published form, its size, and checksums of known files.

The checksums are those of the files in the Hugging Face repositories named here, and several independent projects pin
the same values. A file without a known checksum is accepted, and its checksum is recorded.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Columns:
    """The columns of one published form of a set."""

    problem: str
    """Column of the problem."""
    answer: str
    """Column of the answer. A dot names a field within the column, as in `reward_model.ground_truth`."""
    boxed: bool = False
    r"""Whether the answer is the content of the last \boxed{} in that column."""

    @property
    def needed(self) -> tuple[str, str]:
        """The columns that distinguish this form from the others."""
        return self.problem, self.answer.partition(".")[0]


@dataclass(frozen=True)
class PublishedSet:
    """A published set of problems with answers."""

    title: str
    where: str
    """Repositories that publish the set."""
    problems: tuple[int, int]
    """Smallest and largest accepted number of distinct problems."""
    forms: tuple[Columns, ...]
    hub_ids: tuple[str, ...] = ()
    """Data sets of the Hub that are the whole set, in one of the forms."""
    checksums: dict[str, str] = field(default_factory=dict)
    """Name of the known file with each SHA-256."""


_VERL = Columns("prompt", "reward_model.ground_truth")

SETS: dict[str, PublishedSet] = {
    "dapo-math-17k": PublishedSet(
        "DAPO-Math-17k",
        "BytedTsinghua-SIA/DAPO-Math-17k (data/dapo-math-17k.parquet: 17,917 rows, each 100 times), "
        "open-r1/DAPO-Math-17k-Processed",
        # Published counts depend on the comparison of texts and on the treatment of contradictory answers: 17,188
        # ignoring white space, 17,391 to 17,398 by exact text, 17,405 by text and answer.
        problems=(17_176, 17_405),
        hub_ids=("BytedTsinghua-SIA/DAPO-Math-17k",),
        forms=(_VERL, Columns("prompt", "solution")),
        checksums={"534375d6bb8630d22ab46a56e11f2ffec1d288d8f7d04099bc82d68948705941": "data/dapo-math-17k.parquet"},
    ),
    "aime-2024": PublishedSet(
        "AIME 2024",
        "HuggingFaceH4/aime_2024, Maxwell-Jia/AIME_2024, math-ai/aime24, BytedTsinghua-SIA/AIME-2024 (each 32 times)",
        problems=(30, 30),
        hub_ids=(
            "HuggingFaceH4/aime_2024",
            "Maxwell-Jia/AIME_2024",
            "math-ai/aime24",
            "BytedTsinghua-SIA/AIME-2024",
        ),
        forms=(
            Columns("problem", "answer"),
            Columns("Problem", "Answer"),
            _VERL,
            Columns("problem", "solution", boxed=True),
        ),
        checksums={
            "26139847601a5037c237d5928b195e7260ca8074cf4f264b794af42847f79ccf": "HuggingFaceH4/aime_2024",
            "2602156eb2a0ab64393dc46617a3bfee3451ae3c985a7ea6ac2b55436e094a38": "math-ai/aime24",
            "12154e38a716d12db5731f9a022ae69a610c4f7d0e0dcc04e902887a686877e7": "BytedTsinghua-SIA/AIME-2024",
        },
    ),
    "aime-2025": PublishedSet(
        "AIME 2025",
        "math-ai/aime25 (test.jsonl), opencompass/AIME2025 (aime2025-I.jsonl and aime2025-II.jsonl)",
        problems=(30, 30),
        hub_ids=("math-ai/aime25",),
        forms=(Columns("problem", "answer"), Columns("question", "answer")),
        checksums={
            "b4e273c02d3e7fe1b74b59eae768fc8230bfb0f79539890cb56f4361caac0331": "math-ai/aime25",
            "b91b3c96f05d9635d2a0692b124ebe023c1ff59cb19c074275e6c4b349d0659e": "opencompass/AIME2025, AIME I",
            "16a2dcfbbf9db1b11f8a69a3ba5e4cac73e3641b19a37e2307e9c12240bbed5e": "opencompass/AIME2025, AIME II",
        },
    ),
    "math-500": PublishedSet(
        "MATH-500",
        "HuggingFaceH4/MATH-500 (test.jsonl)",
        problems=(500, 500),
        hub_ids=("HuggingFaceH4/MATH-500",),
        forms=(Columns("problem", "answer"),),
        checksums={"35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132": "HuggingFaceH4/MATH-500"},
    ),
    "minerva": PublishedSet(
        "Minerva (OCWCourses)",
        "math-ai/minervamath, Qwen2.5-Math (evaluation/data/minerva_math/test.jsonl)",
        problems=(272, 272),
        hub_ids=("math-ai/minervamath",),
        forms=(
            Columns("question", "answer"),
            Columns("problem", "answer"),
            Columns("problem", "solution", boxed=True),
        ),
    ),
    "olympiadbench": PublishedSet(
        "OlympiadBench (open-ended, text only, maths, English, competitions)",
        "Hothan/OlympiadBench (OE_TO_maths_en_COMP: 674), Qwen2.5-Math (675)",
        problems=(674, 675),
        hub_ids=("Hothan/OlympiadBench",),
        forms=(Columns("question", "final_answer"), Columns("question", "answer")),
    ),
}
