"""How keys and values are stored: names, widths, groups."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

__all__ = ["AXES", "CacheScheme", "TensorScheme"]

#: what shares a scale under each name: for keys, and for values
AXES = {
    "uniform": ("tensor", "tensor"),
    "outlier_reduced": ("tensor", "tensor"),
    "per_channel": ("channel", "channel"),
    "per_token": ("token", "token"),
    "kcvt": ("channel", "token"),
    "ktvc": ("token", "channel"),
}
_NAMES = f"one of {', '.join(AXES)}"
_OPTIONS = "bits, k_bits, v_bits, g, k_g, v_g, residual" + ", and s of outlier_reduced"


class TensorScheme(BaseModel):
    """How keys, or values, of shape (sequences, heads, tokens, channels) are stored.

    :param bits: width of a code; 16 leaves them as they are
    :param axis: what shares a scale: ``tensor``, some tokens with all heads and channels;
        ``channel``, some tokens of one channel; ``token``, some channels of one token's head
    :param group: how many tokens or channels that is; None for as many as there are at once, in a
        sequence or a head
    :param outliers: share of the values, the largest ones, that stay in 16 bits
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Literal[2, 3, 4, 8, 16]
    axis: Literal["tensor", "channel", "token"]
    group: int | None = None
    outliers: float = 0.0


class CacheScheme(BaseModel):
    """How a cache stores keys and values.

    Tokens wait in the model's own type until ``residual`` of them are there, as in KIVI (arXiv
    2402.02750). Where a scale is of a whole sequence (``g=N``, and ``uniform``, ``outlier_reduced``
    unless told), that is the prompt; later tokens make groups of ``residual``.

    :param name: what the user called it
    :param keys: of the keys
    :param values: of the values
    :param residual: tokens that are quantized together
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    keys: TensorScheme
    values: TensorScheme
    residual: int

    @model_validator(mode="after")
    def _groups_fit(self) -> "CacheScheme":
        if self.residual < 1:
            raise ValueError(f"residual must be at least 1, got {self.residual}")
        tensors = [each for each in (self.keys, self.values) if each.axis != "token"]
        if len({each.group is None for each in tensors}) > 1:
            raise ValueError("k_g and v_g must both be N, or neither")
        for what, tensor in (("k", self.keys), ("v", self.values)):
            if tensor.group is not None and tensor.group < 1:
                raise ValueError(f"{what}_g must be at least 1, got {tensor.group}")
            grouped = tensor.axis != "token" and tensor.group is not None
            if grouped and self.residual % tensor.group:
                raise ValueError(
                    f"{what}_g: groups of {tensor.group} tokens do not divide the residual of "
                    f"{self.residual}"
                )
        return self

    @property
    def by_prompt(self) -> bool:
        """Whether a scale is of a whole prompt."""
        tensors = (self.keys, self.values)
        return any(each.axis != "token" and each.group is None for each in tensors)

    @classmethod
    def parse(cls, text: str) -> "CacheScheme":
        """``NAME:option=value,...``, such as ``kcvt:bits=2,g=128``.

        Names are those of LVLM-Compress-Bench (NAACL 2025): ``uniform``, ``outlier_reduced``,
        ``per_channel``, ``per_token``, ``kcvt`` (keys per channel, values per token: KIVI's) and
        ``ktvc``. ``bits`` (``k_bits``, ``v_bits``) is 2, 3, 4, 8, or 16 for none; ``g`` (``k_g``,
        ``v_g``) tokens or channels of a group, or ``N`` for all; ``residual`` tokens, ``g`` of a
        channel or 128; ``s`` the share of outliers.

        :raises ValueError: if the text says something else
        """
        name, _, rest = text.partition(":")
        where = f"kv cache {text!r}"
        if name not in AXES:
            raise ValueError(f"{where}: {name!r} must be {_NAMES}")
        options = {}
        for pair in rest.split(",") if rest else ():
            key, _, value = pair.partition("=")
            try:
                options[key] = None if value == "N" and key.endswith("g") else float(value)
            except ValueError:
                raise ValueError(f"{where}: {pair!r} must be option=number; {_OPTIONS}") from None
        try:
            return cls._of(name, text, options)
        except ValueError as error:
            found = getattr(error, "errors", None)
            why = found()[0]["msg"].removeprefix("Value error, ") if found else error
            raise ValueError(f"{where}: {why}") from None

    @classmethod
    def _of(cls, name: str, text: str, options: dict[str, float | None]) -> "CacheScheme":
        whole = {key: value if value is None else int(value) for key, value in options.items()}
        share = options.pop("s", 0.01) if name == "outlier_reduced" else 0.0
        if not 0 <= share < 1:
            raise ValueError(f"s must lie in [0, 1), got {share}")
        bits = whole.get("bits", 4)
        group = whole.get("g", None if AXES[name][0] == "tensor" else 128)
        tensors = [
            {
                "axis": axis,
                "bits": whole.get(f"{which}_bits", bits),
                "group": whole.get(f"{which}_g", group),
                "outliers": share,
            }
            for which, axis in zip("kv", AXES[name], strict=True)
        ]
        unknown = (
            options.keys()
            - {"bits", "g", "residual"}
            - {f"{t}_{o}" for t in "kv" for o in ("bits", "g")}
        )
        if unknown:
            raise ValueError(f"no option {', '.join(sorted(unknown))}; there are {_OPTIONS}")
        by_token = [each["group"] for each in tensors if each["axis"] != "token"]
        residual = whole.get("residual", max([each or 128 for each in by_token], default=128))
        return cls(name=text, keys=tensors[0], values=tensors[1], residual=residual)
