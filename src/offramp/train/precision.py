"""In which precision a machine trains fastest without a scale for the loss."""

from __future__ import annotations

import torch

__all__ = ["AUTO", "fastest_precision"]

AUTO = "auto"


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
