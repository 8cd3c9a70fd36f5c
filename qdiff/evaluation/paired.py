"""How far one set of pictures is from another, picture by picture (same caption, same seed)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# The side of SSIM's Gaussian window (Wang et al. 2004: 11 pixels, sigma 1.5); a smaller picture has no full window.
SSIM_WINDOW = 11


class PairedQuality(NamedTuple):
    """Full-reference quality of each picture against its own reference.

    psnr: decibels, infinite for identical pictures.  ssim: 1 for identical pictures.
    """

    psnr: Float[Tensor, "pictures"]
    ssim: Float[Tensor, "pictures"]


def paired_quality(
    reference: Float[Tensor, "pictures 3 height width"], candidate: Float[Tensor, "pictures 3 height width"]
) -> PairedQuality:
    """Return PSNR and SSIM of every picture of `candidate` against the same row of `reference`, by torchmetrics.

    Both are floating point in [0, 1], at least 11 pixels a side. SSIM: Wang et al. 2004, Gaussian window of 11 pixels.

    It should be the case that the order of the pictures does not matter to any one picture's figures.

    Raises:
        ValueError: the shapes differ or are no picture batch, or values are not finite or outside [0, 1].
        ImportError: torchmetrics is not installed (`pip install "diffusers-qdiff[eval]"`).
    """
    _check_pictures("reference", reference)
    _check_pictures("candidate", candidate)
    if reference.shape != candidate.shape:
        raise ValueError(
            f"candidate must have the shape of reference: got {tuple(candidate.shape)}, "
            f"expected {tuple(reference.shape)}; generate both with the same captions and size"
        )
    functional = _torchmetrics()
    # float64: a GPU's float32 convolutions may round to TF32, which SSIM's differences of squares do not survive.
    target, preds = reference.double(), candidate.double()
    psnr = functional.peak_signal_noise_ratio(preds, target, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim = structural_similarity(functional, preds, target)
    return PairedQuality(psnr=psnr.reshape(-1).float(), ssim=ssim.float())


def structural_similarity(
    functional: Any, preds: Float[Tensor, "pictures 3 height width"], target: Float[Tensor, "pictures 3 height width"]
) -> Float[Tensor, "pictures"]:
    """SSIM by torchmetrics' `functional`, the mean over the three channels and over windows within the picture.

    By itself torchmetrics also averages windows that reach over the border, into reflections; scikit-image and the
    original do not, and neither does this.
    """
    _, windows = functional.structural_similarity_index_measure(
        preds, target, data_range=1.0, reduction="none", return_full_image=True
    )
    border = SSIM_WINDOW // 2
    return windows[:, :, border:-border, border:-border].mean((1, 2, 3))  # type: ignore[no-any-return]


def _torchmetrics():  # type: ignore[no-untyped-def]  # a module
    try:
        import torchmetrics.functional.image as functional
    except ImportError as error:
        raise ImportError('picture metrics need torchmetrics: pip install "diffusers-qdiff[eval]"') from error
    return functional


def _check_pictures(name: str, pictures: Tensor) -> None:
    if pictures.ndim != 4 or pictures.shape[1] != 3 or len(pictures) == 0 or min(pictures.shape[2:]) < SSIM_WINDOW:
        raise ValueError(
            f"{name} must be [pictures, 3, height, width], one picture or more, {SSIM_WINDOW} pixels a side or more: "
            f"got {tuple(pictures.shape)}"
        )
    if not pictures.is_floating_point():
        raise ValueError(f"{name} must be floating point in [0, 1]: got {pictures.dtype}; divide by 255 first")
    low, high = torch.aminmax(pictures)
    if not (low >= 0 and high <= 1):  # also true of NaN
        raise ValueError(f"{name} must be finite and in [0, 1]: got values from {low:.4g} to {high:.4g}")
