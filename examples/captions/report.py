"""The targets, and report.md: everything measured, and what it was measured on."""

from __future__ import annotations

from captions.matching import JUDGED
from common.report import conditions_section, cost_rows, table, targets_section
from digits.report import distance_table

MIN_ACCURACY = 0.90
MIN_PROPERTIES = 0.75
MAX_LOSS = 0.05
MAX_MACS = 0.75
_NAMES = {
    "digit": "the digit",
    "thickness": "thickness",
    "tilt": "tilt",
    "width": "width",
    "properties": "all stated properties",
    "everything": "all stated properties and the digit",
}


def judge(results: dict) -> dict[str, bool]:
    """Target -> whether it was met."""
    fitting, macs = results["fitting"], results["macs"]
    dense, flexpixart = fitting["dense"], fitting["flexpixart"]
    targets = {}
    for name, shares in (("dense PixArt", dense), ("FlexPixArt", flexpixart)):
        targets |= {
            f"{name}: the stated digit in at least {MIN_ACCURACY:.0%}": shares["digit"] >= MIN_ACCURACY,
            f"{name}: all stated properties in at least {MIN_PROPERTIES:.0%}": shares["properties"] >= MIN_PROPERTIES,
        }
    return targets | {
        f"FlexPixArt: all stated properties at most {100 * MAX_LOSS:.0f} points below dense": (
            flexpixart["properties"] >= dense["properties"] - MAX_LOSS
        ),
        f"FlexPixArt: at most {MAX_MACS:.0%} of the dense MACs": macs["flexpixart"] <= MAX_MACS * macs["dense"],
    }


def to_markdown(results: dict) -> str:
    encoder = {"words": "small, learned with each model", "T5": "T5, frozen"}[results["text_encoder"]]
    conditions = conditions_section(results, "FlexPixArt", "captions") + f"\n- Text encoder: {encoder}"
    sections = [
        table(["", "dense PixArt", "FlexPixArt"], cost_rows(results, "flexpixart", "image")),
        f"Counted for captions of {round(results['caption_tokens'])} tokens, their mean, without the text encoder.",
        _fitting_table(results),
        _explanation(results),
        distance_table(results, "flexpixart", "FlexPixArt"),
        targets_section(results),
        conditions,
    ]
    return "# FlexPixArt on handwritten digits with captions\n\n" + "\n\n".join(sections) + "\n"


def _fitting_table(results: dict) -> str:
    columns = ("dense", "flexpixart", "held_out", "shuffled", "shuffled_within_digit")
    header = [
        "captions that fit their picture",
        "stated in",
        "dense PixArt",
        "FlexPixArt",
        "real digits, held out",
        "FlexPixArt, captions shuffled",
        "FlexPixArt, shuffled within each digit",
    ]
    rows = [
        [_NAMES[judged], str(results["stated"][judged])]
        + [f"{results['fitting'][column][judged]:.1%}" for column in columns]
        for judged in JUDGED
    ]
    return table(header, rows)


def _explanation(results: dict) -> str:
    limits, (gap, error) = results["thresholds"], results["properties_difference"]
    return (
        f"All stated properties, FlexPixArt minus dense: {100 * gap:+.1f} points (standard error {100 * error:.1f})."
        "\n\n"
        "Each row counts the captions that state something of it. The digit is judged by the classifier; properties "
        "are measured, with terciles of the training digits as limits: "
        f"ink of {limits['thickness'][0]:.1f} and {limits['thickness'][1]:.1f} pixels, "
        f"a tilt of {limits['tilt'][0]:.2f} and {limits['tilt'][1]:.2f}, "
        f"a spread along x of {limits['width'][0]:.2f} and {limits['width'][1]:.2f} pixels. "
        "The captions state what was measured on the held-out digits, so these have all properties by construction. "
        "With the captions shuffled among the samples, what fits is chance; shuffled among the samples of one digit, "
        "it is what a model would reach that reads nothing but the digit."
    )
