"""How keys and values are stored: names, widths, groups."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

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
_OPTIONS = ("bits", "k_bits", "v_bits", "g", "k_g", "v_g", "residual")


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
    group: int | None = Field(None, ge=1)
    outliers: float = Field(0.0, ge=0, lt=1)

    def check_channels(self, channels: int) -> None:
        """
        :param channels: of a head
        :raises ValueError: if groups of channels do not divide them
        """
        size = min(self.group or channels, channels)
        if self.axis == "token" and channels % size:
            raise ValueError(
                f"kv cache: groups of {size} channels do not divide the {channels} of a head"
            )


class CacheScheme(BaseModel):
    """How a cache stores keys and values.

    Tokens wait in the model's own type until ``residual`` of them are there, as keys do in KIVI
    (arXiv 2402.02750); of values KIVI leaves the last ``residual`` so at any time. Where a scale is
    of a whole sequence (``g=N``, and ``uniform``, ``outlier_reduced`` unless told), that is the
    prompt; later tokens make groups of ``residual``.

    :param name: what the user called it
    :param keys: of the keys
    :param values: of the values
    :param residual: tokens that are quantized together
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    keys: TensorScheme
    values: TensorScheme
    residual: int = Field(ge=1)

    @model_validator(mode="after")
    def _groups_fit(self) -> "CacheScheme":
        tensors = [each for each in (self.keys, self.values) if each.axis != "token"]
        if len({each.group is None for each in tensors}) > 1:
            raise ValueError("k_g and v_g must both be N, or neither")
        for what, tensor in (("k", self.keys), ("v", self.values)):
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
        known = (*_OPTIONS, *(["s"] if name == "outlier_reduced" else []))
        try:
            if name not in AXES:
                raise ValueError(f"{name!r} must be one of {', '.join(AXES)}")
            options = {}
            for pair in rest.split(",") if rest else ():
                option, _, value = pair.partition("=")
                if option not in known:
                    raise ValueError(f"no option {option!r}; there are {', '.join(known)}")
                options[option] = _read(option, value)
            if name == "outlier_reduced":
                options.setdefault("s", 0.01)
            return cls(name=text, **_filled(AXES[name], **options))
        except ValidationError as error:
            first = error.errors()[0]
            where = " ".join((f"kv cache {text!r}:", *map(str, first["loc"])))
            raise ValueError(f"{where} {first['msg'].removeprefix('Value error, ')}") from None
        except ValueError as error:
            raise ValueError(f"kv cache {text!r}: {error}") from None


def _read(option: str, value: str) -> int | float | None:
    if value == "N" and option.endswith("g"):
        return None
    try:
        return float(value) if option == "s" else int(value)
    except ValueError:
        raise ValueError(f"{option}={value!r} must be a number") from None


def _filled(axes: tuple[str, str], bits: int = 4, s: float = 0.0, **options) -> dict:
    """What a scheme is made of, where options leave it open.

    :param axes: of keys, and of values
    """
    by_tensor = axes[0] == "tensor"
    group = options.get("g", None if by_tensor else 128)
    tensors = [
        {
            "axis": axis,
            "bits": options.get(f"{which}_bits", bits),
            "group": options.get(f"{which}_g", group),
            "outliers": s,
        }
        for which, axis in zip("kv", axes, strict=True)
    ]
    tokens = [each["group"] or 128 for each in tensors if each["axis"] != "token"]
    residual = options.get("residual", max(tokens, default=128))
    return {"keys": tensors[0], "values": tensors[1], "residual": residual}
