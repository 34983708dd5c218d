"""Results of a sensitivity study, as bit allocation reads them: ``sensitivity.json``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

__all__ = ["Sensitivity", "Shares", "shares_of"]


class Shares(BaseModel):
    """Shares of the quality that depend on one part alone, and on two parts together.

    :param parts: share by part
    :param pairs: share by ``a x b``; all shares sum to 1
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    parts: dict[str, float]
    pairs: dict[str, float]

    @model_validator(mode="after")
    def _of_one_whole(self) -> "Shares":
        values = [*self.parts.values(), *self.pairs.values()]
        if not all(0 <= value <= 1 for value in values) or abs(sum(values) - 1) > 1e-3:
            raise ValueError(f"shares must be from 0 to 1 and sum to 1, got {values}")
        unknown = {part for pair in self.pairs for part in pair.split(" x ")} - set(self.parts)
        if unknown:
            raise ValueError(f"pairs name {sorted(unknown)}, parts are {list(self.parts)}")
        return self


class Sensitivity(BaseModel):
    """The result of ``casp sensitivity`` for bit allocation.

    :param format: version of this file format
    :param model: name or path of the studied model
    :param axis: axis that tells the parts apart: components, or thirds of the blocks in a model of
        one component
    :param methods: shares by quantization method, means over the tasks
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    model: str
    axis: Literal["component", "block group"]
    methods: dict[str, Shares]

    @classmethod
    def load(cls, path: Path | str) -> "Sensitivity":
        """Read a file.

        :raises ValueError: if there is no such file, or it was not written by casp sensitivity
        """
        try:
            return cls.model_validate_json(Path(path).read_text())
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        except ValidationError as error:
            raise ValueError(f"{path} was not written by casp sensitivity: {error}") from None

    def of_method(self, method: str, parts: Sequence[str]) -> Shares:
        """Return the shares of a method among some parts, scaled to sum to 1.

        :raises ValueError: if the method or a part was not studied, or the parts have no share
        """
        if method not in self.methods:
            raise ValueError(
                f"the study of {self.model} has {', '.join(self.methods)}, not {method}: run casp "
                f"sensitivity with --methods {method} too"
            )
        shares = self.methods[method]
        missing = [part for part in parts if part not in shares.parts]
        if missing:
            raise ValueError(f"the study of {self.model} has {list(shares.parts)}, not {missing}")
        kept = {part: shares.parts[part] for part in parts}
        pairs = {pair: v for pair, v in shares.pairs.items() if set(pair.split(" x ")) <= set(kept)}
        total = sum(kept.values()) + sum(pairs.values())
        if not total:
            raise ValueError(f"the study of {self.model} gives {', '.join(parts)} no share")
        return Shares(
            parts={part: value / total for part, value in kept.items()},
            pairs={pair: value / total for pair, value in pairs.items()},
        )


def shares_of(
    importances: Sequence[Mapping[str, float]], pairs: Sequence[Mapping[str, float]]
) -> Shares:
    """Return the mean shares over the analyses of several tasks.

    :param importances: consensus importance by part, one mapping per task, summing to 1
    :param pairs: share that two parts have only together, by ``a x b``, one mapping per task
    """
    count = len(importances)
    together = {pair: sum(task[pair] for task in pairs) / count for pair in pairs[0]}
    alone = 1 - sum(together.values())
    parts = {
        part: sum(task[part] for task in importances) / count * alone for part in importances[0]
    }
    return Shares(parts=parts, pairs=together)
