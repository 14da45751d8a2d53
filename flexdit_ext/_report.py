"""Report: where every tensor of a converted model comes from, and what became of every tensor of the source."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass
class Report:
    """Filled by the converters.

    mapped: tensor of the result -> tensors of the source that it was made of.
    initialised: tensor of the result that the source does not have -> what it was set to.
    missing: tensors of the result that the source should have.
    unused: tensor (or other entry) of the source -> why it is not in the result.
    notes: what else is worth knowing.
    """

    mapped: dict[str, tuple[str, ...]] = field(default_factory=dict)
    initialised: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def start(self, names: Iterable[str]) -> None:
        self.mapped = {name: (name,) for name in names}

    def follow(self, made_of: Mapping[str, Iterable[str]], dropped: Mapping[str, str] | None = None) -> None:
        """One step of a conversion: each new tensor and the tensors before the step that it was made of; tensors that
        were dropped, with the reason."""
        for name, reason in (dropped or {}).items():
            self.unused |= dict.fromkeys(self.mapped.get(name, (name,)), reason)
        initialised = self.initialised
        self.initialised = {new: initialised[n] for new, names in made_of.items() for n in names if n in initialised}
        self.mapped = {
            new: tuple(origin for name in names for origin in self.mapped.get(name, ()))
            for new, names in made_of.items()
            if all(name in self.mapped for name in names)
        }

    def initialise(self, name: str, how: str) -> None:
        self.initialised[name] = how
        self.mapped.pop(name, None)

    def lines(self) -> list[str]:
        """For people: tensors of blocks that went the same way share a line."""
        out = [f"mapped: {len(self.mapped)} tensors"]
        out += _grouped({new: " + ".join(old) for new, old in self.mapped.items()}, "<-")
        for title, entries in (("initialised", self.initialised), ("unused", self.unused)):
            out.append(f"{title}: {len(entries)}")
            out += _grouped(entries, "=" if title == "initialised" else ":")
        out.append(f"missing: {len(self.missing)}")
        out += [f"  {name}" for name in self.missing]
        return out + [f"note: {note}" for note in self.notes]


def _grouped(entries: Mapping[str, str], sign: str) -> list[str]:
    """One line for the entries that are the same but for numbers of blocks and weight or bias."""
    groups: dict[tuple[str, str], int] = {}
    for pair in entries.items():
        key = tuple(re.sub(r"\.(weight|bias)\b", ".*", re.sub(r"\b\d+\b(?=\.)", "#", text)) for text in pair)
        groups[key] = groups.get(key, 0) + 1
    return [
        f"  {name} {sign} {value}" + (f"  ({count} tensors)" if count > 1 else "")
        for (name, value), count in groups.items()
    ]
