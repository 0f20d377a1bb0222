"""Which GPUs hold Qwen3-4B learning from Qwen3-32B, and by which settings? By the estimator, from sizes alone.

    python benchmarks/fit.py

Prints the table of docs/placement.md. No model is opened: the sizes are those of the two configs.
"""

from __future__ import annotations

from study import ROOT

from kdpipe.doctor.budget import Sizes, sizes
from kdpipe.doctor.estimate import Sized
from kdpipe.models.reference import Shape
from kdpipe.recipe.file import load_recipe

COUNTS, GIB = (1, 2, 4, 8), (40, 80, 141)
PROMPT_TOKENS = 150
"""Of GSM8K, with Qwen3's template."""
QWEN3 = {
    "0.6B": Shape(596_049_920, layers=28, hidden=1024, intermediate=3072, kv_width=1024, rows=151_936),
    "4B": Shape(4_022_468_096, layers=36, hidden=2560, intermediate=9728, kv_width=1024, rows=151_936),
    "8B": Shape(8_190_735_360, layers=36, hidden=4096, intermediate=12_288, kv_width=1024, rows=151_936),
    "32B": Shape(32_762_123_264, layers=64, hidden=5120, intermediate=25_600, kv_width=1024, rows=151_936),
}


def fitted(student: str, teacher: str, *, count: int, gib: int) -> Sizes:
    """What gsm8k-qwen3-opd takes of so many GPUs of so many GiB, with these models in it."""
    recipe = load_recipe(ROOT / "recipes" / "gsm8k-qwen3-opd.yaml", ()).recipe
    [name] = [one.name for one in recipe.teachers]
    return sizes(
        recipe,
        Sized("student", QWEN3[student], "bfloat16"),
        {name: Sized(name, QWEN3[teacher], "bfloat16")},
        prompt_tokens=PROMPT_TOKENS,
        memory={f"cuda:{number}": gib << 30 for number in range(count)},
    )


def table() -> str:
    """A line for each number and size of GPUs: what the fullest would hold, and what makes it fit."""
    lines = [["GPUs", "fullest as the recipe stands", "fits"], ["---"] * 3]
    for gib in GIB:
        for count in COUNTS:
            found = fitted("4B", "32B", count=count, gib=gib)
            fullest = max(device.peak_bytes for device in found.devices)
            how = "yes" if found.fits else ", ".join(f"`{change}`" for change in found.changes) or "no"
            lines.append([f"{count} x {gib} GiB", f"{fullest / 1e9:.0f} GB", how])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table())
