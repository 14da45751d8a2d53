"""The targets, and report.md: everything measured, and what it was measured on."""

from __future__ import annotations

from common.report import conditions_section, cost_rows, table, targets_section

MIN_ACCURACY = {"digit": 0.85, "motion": 0.90}
MAX_LOSS = 0.05  # of FlexLatte's accuracies against the dense model's
MIN_SAVING = 0.40  # of multiply-accumulates
WHAT = {
    "digit": "the digit, frame by frame",
    "motion": "the motion",
    "clip": "the motion, and the digit in every frame",
}


def judge(results: dict) -> dict[str, bool]:
    """Target -> whether it was met."""
    accuracy, macs = results["accuracy"], results["macs"]
    targets = {}
    for name, least in MIN_ACCURACY.items():
        dense, flexlatte = accuracy["dense"][name], accuracy["flexlatte"][name]
        targets[f"FlexLatte: {WHAT[name]}, right in at least {least:.0%}"] = flexlatte >= least
        targets[f"FlexLatte: {WHAT[name]}, at most {100 * MAX_LOSS:.0f} points below dense"] = (
            flexlatte >= dense - MAX_LOSS
        )
    targets[f"at least {MIN_SAVING:.0%} fewer MACs"] = macs["flexlatte"] <= (1 - MIN_SAVING) * macs["dense"]
    return targets


def to_markdown(results: dict) -> str:
    sections = [_model_table(results), _note(results), targets_section(results)]
    sections.append(conditions_section(results, "FlexLatte"))
    return "# FlexLatte on clips of handwritten digits\n\n" + "\n\n".join(sections) + "\n"


def _model_table(results: dict) -> str:
    accuracy = results["accuracy"]
    rows = [[*row, ""] for row in cost_rows(results, "flexlatte", "clip")]
    for name, what in WHAT.items():
        rows.append(
            [f"classifiers see {what}", *(f"{accuracy[key][name]:.1%}" for key in ("dense", "flexlatte", "held_out"))]
        )
    return table(["", "dense Latte", "FlexLatte", "held-out real clips"], rows)


def _note(results: dict) -> str:
    counts = results["counts"]
    return (
        f"{counts['samples']} clips of each model, {counts['per_class']} of each of {counts['classes']} classes (digit "
        f"and motion). The classifiers were trained on clips of the {counts['train']} training digits, as were the "
        f"models; the {counts['held_out']} real clips are of held-out digits."
    )
