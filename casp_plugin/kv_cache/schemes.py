"""Schemes by which keys and values are stored: names, widths, groups."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

__all__ = ["AXES", "CacheScheme", "TensorScheme"]

#: values that share a scale under every name: of keys, and of values
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
    """The scheme of keys, or of values, of shape (sequences, heads, tokens, channels).

    :param bits: width of a code; 16 leaves the values as they are
    :param axis: values that share a scale: ``tensor``, some tokens with all heads and channels;
        ``channel``, some tokens of one channel; ``token``, some channels of one token in one head
    :param group: number of these tokens or channels; None for all tokens that come at once, or all
        channels of a head
    :param outliers: share of the values, 0 to 1, that stay in 16 bits: the largest by magnitude
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Literal[2, 3, 4, 8, 16]
    axis: Literal["tensor", "channel", "token"]
    group: int | None = Field(None, ge=1)
    outliers: float = Field(0.0, ge=0, lt=1)

    def check_channels(self, channels: int) -> None:
        """Check that groups of channels divide a head.

        :param channels: channels of a head
        :raises ValueError: if groups of channels do not divide them
        """
        size = min(self.group or channels, channels)
        if self.axis == "token" and channels % size:
            raise ValueError(
                f"kv cache: groups of {size} channels do not divide the {channels} of a head"
            )


class CacheScheme(BaseModel):
    """The schemes of keys and values in a cache.

    Tokens wait in the model's own dtype until there are ``residual`` of them, as keys do in KIVI
    (arXiv 2402.02750); KIVI never quantizes the last ``residual`` values. Where a whole sequence
    shares a scale (``g=N``, the default of ``uniform`` and ``outlier_reduced``), that sequence is
    the prompt, and later tokens form groups of ``residual``.

    :param name: the user's name for it
    :param keys: scheme of the keys
    :param values: scheme of the values
    :param residual: number of tokens that are quantized together
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    keys: TensorScheme
    values: TensorScheme
    residual: int = Field(ge=1)

    @model_validator(mode="after")
    def _groups_fit(self) -> "CacheScheme":
        over_tokens = [tensor for tensor in (self.keys, self.values) if tensor.axis != "token"]
        if len({tensor.group is None for tensor in over_tokens}) > 1:
            raise ValueError("k_g and v_g must both be N, or neither")
        for which, tensor in (("k", self.keys), ("v", self.values)):
            grouped = tensor.axis != "token" and tensor.group is not None
            if grouped and self.residual % tensor.group:
                raise ValueError(
                    f"{which}_g: groups of {tensor.group} tokens do not divide the residual of "
                    f"{self.residual}"
                )
        return self

    @property
    def by_prompt(self) -> bool:
        """Tell whether a whole prompt shares a scale."""
        tensors = (self.keys, self.values)
        return any(tensor.axis != "token" and tensor.group is None for tensor in tensors)

    @classmethod
    def parse(cls, text: str) -> "CacheScheme":
        """Read a scheme from ``NAME:option=value,...``, such as ``kcvt:bits=2,g=128``.

        Names are those of LVLM-Compress-Bench (NAACL 2025): ``uniform``, ``outlier_reduced``,
        ``per_channel``, ``per_token``, ``kcvt`` (keys per channel, values per token, as in KIVI)
        and ``ktvc``. Options:

        - ``bits`` (``k_bits``, ``v_bits``): 2, 3, 4, 8, or 16 for no quantization; default 4
        - ``g`` (``k_g``, ``v_g``): tokens or channels of a group, or ``N`` for all
        - ``residual``: tokens that are quantized together; default the largest ``g`` of tokens, or
          128
        - ``s``: share of outliers, of ``outlier_reduced`` only; default 0.01

        :raises ValueError: if the text has another form, name or option
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
                options[option] = _number(option, value)
            if name == "outlier_reduced":
                options.setdefault("s", 0.01)
            return cls(name=text, **_with_defaults(AXES[name], **options))
        except ValidationError as error:
            first = error.errors()[0]
            where = " ".join((f"kv cache {text!r}:", *map(str, first["loc"])))
            raise ValueError(f"{where} {first['msg'].removeprefix('Value error, ')}") from None
        except ValueError as error:
            raise ValueError(f"kv cache {text!r}: {error}") from None


def _number(option: str, value: str) -> int | float | None:
    if value == "N" and option.endswith("g"):
        return None
    try:
        return float(value) if option == "s" else int(value)
    except ValueError:
        raise ValueError(f"{option}={value!r} must be a number") from None


def _with_defaults(axes: tuple[str, str], bits: int = 4, s: float = 0.0, **options) -> dict:
    """Return the fields of a scheme, with defaults for options that are not given.

    :param axes: axis of keys, and of values
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
    tokens = [tensor["group"] or 128 for tensor in tensors if tensor["axis"] != "token"]
    residual = options.get("residual", max(tokens, default=128))
    return {"keys": tensors[0], "values": tensors[1], "residual": residual}
