"""Precisions that fit() trains in, and the fastest of a machine that needs no scale of the loss."""

from __future__ import annotations

import torch

from offramp.errors import DataError

__all__ = ["AUTO", "fastest_precision", "known_precision"]

AUTO = "auto"

# Weights stay in single precision in all of them. Lightning knows the shorter names as well.
_NAMES = ("32-true", "bf16-mixed", "16-mixed")
_ALIASES = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def known_precision(precision: str | int) -> str:
    """The full name of a precision that ``fit`` trains in, or ``"auto"``.

    Raises:
        DataError: any other, such as ``"64-true"``, which would convert the model.
    """
    name = _ALIASES.get(str(precision), str(precision))
    if name not in (*_NAMES, AUTO):
        raise DataError(
            f"precision={precision!r}: expected one of {', '.join(map(repr, (*_NAMES, AUTO)))}, "
            "which leave the weights as they are. To train in another type, convert the model and "
            'the data by yourself, with model.to(torch.float64) say, and keep "32-true".'
        )
    return name


def fastest_precision(accelerator: str = "auto") -> str:
    """``"bf16-mixed"`` where bfloat16 is multiplied by instructions of its own, else ``"32-true"``.

    A processor without them computes bfloat16 by way of single precision, which takes longer than
    single precision alone.

    Args:
        accelerator: as ``fit`` takes it; ``"cpu"`` leaves other devices out.
    """
    if accelerator != "cpu" and torch.cuda.is_available():
        own = torch.cuda.is_bf16_supported(including_emulation=False)
    elif accelerator == "cpu" or not torch.accelerator.is_available():
        # Younger than torch 2.9. The names are those of x86 and of ARM.
        known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
        own = any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    else:
        own = False  # other devices are not told apart
    return "bf16-mixed" if own else "32-true"
