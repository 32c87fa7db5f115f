"""Deep Inside Convolutional Networks: Visualising Image Classification Models and Saliency Maps (Simonyan et al., arXiv:1312.6034).

Three things the gradient of a class score by the image is good for, on any torch model:

    Saliency(model)(images, target=3)                which pixels matter: (B, H, W) in [0, 1]
    class_images(model, [0, 1, 2], (3, 224, 224))    what the classes look like to the network: (3, 3, 224, 224)
    object_mask(image, saliency)                     where the object is, without ever having seen a mask: bool (H, W)

Scores are the ones before the softmax (sec. 2): after it, a class also gains by what lowers the others.
"""

from __future__ import annotations

import numpy
import torch
from torch import Tensor, nn

from paperzoo.blocks.explaining import Target, explaining, rescale, select
from paperzoo.papers.interpretability.deep_inside_saliency.graph_cut import Mixture, graph_cut


class Saliency:
    """Image-specific class saliency (sec. 3): S_c(I) is near w^T I + b, and |w| says what the score hangs on.

    Args:
        model: any module; its output is (B, num_classes), or anything that a callable target understands.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def gradient(self, inputs: Tensor, target: Target = None) -> Tensor:
        """w, the derivative of the score by every value of the images: (B, C, H, W), signed."""
        with explaining(self.model):
            pixels = inputs.detach().clone().requires_grad_()
            score = select(self.model(pixels.clone()), target)
            return torch.autograd.grad(score.sum(), pixels)[0]

    def magnitude(self, inputs: Tensor, target: Target = None) -> Tensor:
        """M of sec. 3.1, the largest |w| among the channels of a pixel: (B, H, W), not negative, in the score's units."""
        return self.gradient(inputs, target).abs().amax(1)

    def __call__(self, inputs: Tensor, target: Target = None) -> Tensor:
        """`magnitude` of each image scaled to [0, 1], float32; a constant one becomes zero."""
        return rescale(self.magnitude(inputs, target).float())


def class_images(
    model: nn.Module,
    classes: list[int] | Tensor,
    shape: tuple[int, int, int],
    steps: int = 200,
    learning_rate: float = 1.0,
    weight_decay: float = 0.01,
) -> Tensor:
    """Images that a network would call by their class: argmax over I of S_c(I) - lambda |I|^2 (eq. 1), by gradient ascent.

    Args:
        model: images -> logits (B, num_classes); it is left as it was found.
        classes: the classes, one image each; all are made together.
        shape: (C, H, W).
        steps: of the ascent, which begins at the zero image (sec. 2); that is the mean image of normalised ones.
        learning_rate: its step.
        weight_decay: lambda; 0 lets the image grow without end.

    Returns:
        (len(classes), C, H, W) float32, as the network takes images.
    """
    target = torch.as_tensor(classes)
    with explaining(model):
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        images = torch.zeros(len(target), *shape, device=device)
        for _ in range(steps):
            pixels = images.clone().requires_grad_()
            score = select(model(pixels), target).sum()
            slope = torch.autograd.grad(score, pixels)[0] - 2 * weight_decay * images
            images = images + learning_rate * slope
    return images.detach()


def object_mask(
    image: Tensor, saliency: Tensor, foreground: float = 0.95, background: float = 0.30, components: int = 5
) -> Tensor:
    """Weakly supervised segmentation (sec. 3.2): colours of salient pixels against those of the others, and a graph cut.

    Args:
        image: uint8 (3, H, W) or (1, H, W).
        saliency: (H, W), of this image.
        foreground: pixels above this quantile of the saliency give the colours of the object (the paper's 95%).
        background: pixels below this one give those of the background (the paper's 30%).
        components: Gaussians in each of the two colour models.

    Returns:
        bool (H, W), the largest connected part that the cut calls object; empty where it calls nothing so.
    """
    from scipy.ndimage import label

    colours = image.permute(1, 2, 0).double().numpy() / 255
    values = saliency.double().cpu().numpy()
    high, low = numpy.quantile(values, foreground), numpy.quantile(values, background)
    sure, sure_not = values >= high, values <= low
    costs = [-Mixture(colours[seeds], components).log_density(colours) for seeds in (sure, sure_not)]
    found = graph_cut(colours, costs[0], costs[1])
    parts, count = label(found)
    if count == 0:
        return torch.zeros(found.shape, dtype=torch.bool)
    return torch.from_numpy(parts == 1 + numpy.bincount(parts.ravel())[1:].argmax())
