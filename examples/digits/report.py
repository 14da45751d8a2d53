"""The targets, and report.md: everything measured, and what it was measured on."""

from __future__ import annotations

from common.report import conditions_section, cost_rows, table, targets_section

MIN_ACCURACY = 0.90
MAX_DISTANCE_RATIO = 1.15


def judge(results: dict) -> dict[str, bool]:
    """Target -> whether it was met."""
    accuracy = results["accuracy"]
    return {
        f"accuracy of dense samples at least {MIN_ACCURACY:.0%}": accuracy["dense"] >= MIN_ACCURACY,
        f"accuracy of FlexDiT samples at least {MIN_ACCURACY:.0%}": accuracy["flexdit"] >= MIN_ACCURACY,
        f"Fréchet distance of FlexDiT at most {MAX_DISTANCE_RATIO} of dense": (
            results["frechet_distance"]["ratio"] <= MAX_DISTANCE_RATIO
        ),
    }


def to_markdown(results: dict) -> str:
    sections = [_model_table(results), distance_table(results, "flexdit", "FlexDiT"), targets_section(results)]
    sections.append(conditions_section(results, "FlexDiT"))
    return "# FlexDiT on handwritten digits\n\n" + "\n\n".join(sections) + "\n"


def _model_table(results: dict) -> str:
    accuracy = results["accuracy"]
    rows = [
        *cost_rows(results, "flexdit", "image"),
        ["classifier's accuracy on the first set of samples", f"{accuracy['dense']:.1%}", f"{accuracy['flexdit']:.1%}"],
    ]
    return table(["", "dense DiT", "FlexDiT"], rows)


def distance_table(results: dict, key: str, name: str) -> str:
    """results: with what metrics.compare_distances gives, and the classifier's accuracy; key, name: of the sparse
    model."""
    distance, counts = results["frechet_distance"], results["counts"]
    by_set = "; ".join(
        f"{one} {', '.join(f'{value:.3f}' for value in values)}" for one, values in distance["by_set"].items()
    )
    rows = [
        [
            f"{counts['samples']} dense samples, training digits (mean of {counts['sets']} sets)",
            f"{distance['dense']:.3f}",
        ],
        [
            f"{counts['samples']} {name} samples, training digits (mean of {counts['sets']} sets)",
            f"{distance[key]:.3f}",
        ],
        [f"{counts['held_out']} held-out real digits, training digits", f"{distance['held_out']:.3f}"],
        ["two disjoint halves of the training digits", f"{distance['train_halves']:.3f}"],
        [
            f"{name} / dense",
            f"{distance['ratio']:.3f} (bootstrap standard error {distance['ratio_standard_error']:.3f})",
        ],
    ]
    held_out_accuracy = f"{results['accuracy']['held_out']:.1%}"
    note = (
        f"In the features of a classifier that is right on {held_out_accuracy} of the held-out digits. "
        f"The sets one by one: {by_set}; pictures are the first set's."
    )
    return table(["Fréchet distance", ""], rows) + "\n\n" + note
