"""What is known of each set: its columns, in every form it is published in; its size; checksums of known files.

Checksums are of the files as the Hugging Face repositories named here serve them; several independent projects pin the
same values. A file without a known checksum is accepted, its checksum recorded.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Columns:
    """One form of a set: where the problem and the answer are."""

    problem: str
    answer: str
    """`reward_model.ground_truth` is a field of a column."""
    boxed: bool = False
    r"""The answer is what the last \boxed{} of that column holds."""

    @property
    def needed(self) -> tuple[str, str]:
        """The columns that tell this form from others."""
        return self.problem, self.answer.partition(".")[0]


@dataclass(frozen=True)
class PublishedSet:
    """A set of problems with answers."""

    title: str
    where: str
    """Repositories it is published in."""
    problems: tuple[int, int]
    """Fewest and most distinct problems it may have."""
    forms: tuple[Columns, ...]
    checksums: dict[str, str] = field(default_factory=dict)
    """SHA-256 -> which file has it."""


_VERL = Columns("prompt", "reward_model.ground_truth")

SETS: dict[str, PublishedSet] = {
    "dapo-math-17k": PublishedSet(
        "DAPO-Math-17k",
        "BytedTsinghua-SIA/DAPO-Math-17k (data/dapo-math-17k.parquet: 17,917 rows, each 100 times), "
        "open-r1/DAPO-Math-17k-Processed",
        # Published counts differ with how alike two texts must be, and whether contradictory ones stay: 17,188 when
        # white space does not count, 17,391 to 17,398 by exact text, 17,405 by text and answer.
        problems=(17_176, 17_405),
        forms=(_VERL, Columns("prompt", "solution")),
        checksums={"534375d6bb8630d22ab46a56e11f2ffec1d288d8f7d04099bc82d68948705941": "data/dapo-math-17k.parquet"},
    ),
    "aime-2024": PublishedSet(
        "AIME 2024",
        "HuggingFaceH4/aime_2024, Maxwell-Jia/AIME_2024, math-ai/aime24, BytedTsinghua-SIA/AIME-2024 (each 32 times)",
        problems=(30, 30),
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
        forms=(Columns("problem", "answer"),),
        checksums={"35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132": "HuggingFaceH4/MATH-500"},
    ),
    "minerva": PublishedSet(
        "Minerva (OCWCourses)",
        "math-ai/minervamath, Qwen2.5-Math (evaluation/data/minerva_math/test.jsonl)",
        problems=(272, 272),
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
        forms=(Columns("question", "final_answer"), Columns("question", "answer")),
    ),
}
