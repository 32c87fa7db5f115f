"""TIRG: Composing Text and Image for Image Retrieval (Vo et al., CVPR 2019, arXiv:1812.07119).

The query, a picture and a sentence that changes it, becomes a point among the pictures: the picture's own feature, gated, plus a
residual (eq. 1). `tirg` composes the features after the last dense layer, `tirg_last_conv` the maps before it, which keeps places
apart. `tirg_concat`, `tirg_image_only` and `tirg_text_only` are the paper's simple baselines around the same two encoders.

Every network is called with (pictures, tokens, lengths) and gives composed features; `embed_image` gives a gallery picture's.
They are compared by their cosines; `normalization_layer` holds the scale that training learns.

Names are those of the released code (google/tirg), which has a ResNet-18 with torchvision's names; a checkpoint's
`model_state_dict` loads unchanged. The released text encoder takes sentences and keeps their vocabulary to itself; here tokens come in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.engine.models import create


class Concatenate(nn.Module):
    """A sequence of features (B, D_i, …) -> (B, sum of D_i, …)."""

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), dim=1)


class NormalizationLayer(nn.Module):
    """x -> norm_s x / |x|, with a learned norm_s: (B, D) -> (B, D). 4 at first, so logits are up to 16 cosines."""

    def __init__(self, normalize_scale: float = 4.0) -> None:
        super().__init__()
        self.norm_s = nn.Parameter(torch.tensor([normalize_scale]))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_s * F.normalize(x, dim=1)


class TextEncoder(nn.Module):
    """Words, an LSTM, its last output, a dense layer (sec. 3.2): tokens (B, T), lengths (B,) -> (B, hidden_size).

    Tokens after a sentence's length are ignored. Id 0 is the unknown word, as in the released code.
    """

    def __init__(self, vocabulary_size: int, embedding_size: int = 512, hidden_size: int = 512) -> None:
        super().__init__()
        self.embedding_layer = nn.Embedding(vocabulary_size, embedding_size)
        self.lstm = nn.LSTM(embedding_size, hidden_size)
        self.fc_output = nn.Sequential(nn.Dropout(0.1), nn.Linear(hidden_size, hidden_size))

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        outputs, _ = self.lstm(self.embedding_layer(tokens.T))  # (T, B, hidden)
        last = (lengths - 1).view(1, -1, 1).expand(1, -1, outputs.shape[2])
        return self.fc_output(outputs.gather(0, last)[0])


class Composer(nn.Module):
    """The two encoders, and what they share. A subclass composes.

    Args:
        vocabulary_size: words the text encoder knows, the unknown one included.
        embed_dim: of both features; 512 in the paper.
        backbone: a classifier, by name; its last layer gives the feature.
        in_channels: channels of the pictures.
    """

    def __init__(
        self,
        vocabulary_size: int = 1000,
        embed_dim: int = 512,
        backbone: str = "resnet18",
        in_channels: int = 3,
        **options: Any,
    ) -> None:
        super().__init__()
        if vocabulary_size < 1 or embed_dim < 1:
            raise ValueError(f"vocabulary_size and embed_dim are 1 or more, got {vocabulary_size} and {embed_dim}")
        self.img_model = create(backbone, num_classes=embed_dim, in_channels=in_channels, **options)
        if isinstance(getattr(self.img_model, "fc", None), nn.Linear):
            self.img_model.fc = nn.Sequential(self.img_model.fc)  # the released code's name is fc.0
        self.text_model = TextEncoder(vocabulary_size, embed_dim, embed_dim)
        self.normalization_layer = NormalizationLayer(4.0)
        self.embed_dim = embed_dim

    def embed_image(self, images: Tensor) -> Tensor:
        """phi_x: (B, in_channels, H, W) -> (B, embed_dim)."""
        return self.img_model(images)

    def embed_text(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """phi_t: int64 (B, T), (B,) -> (B, embed_dim)."""
        return self.text_model(tokens, lengths)

    def forward(self, images: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self.compose(self.embed_image(images), self.embed_text(tokens, lengths))

    def load_backbone(self, state: Mapping[str, Tensor]) -> None:
        """A classifier's weights for the image encoder, its last layer left out.

        Raises:
            ValueError: if they are another network's.
        """
        own = self.img_model.state_dict()
        last = {name for name in own if name.startswith(("fc.", "head.", "classifier."))}
        wrong = [n for n in own if n not in last and (n not in state or state[n].shape != own[n].shape)]
        wrong = [n for n in wrong if not n.endswith("num_batches_tracked")]
        if wrong:
            raise ValueError(f"'{wrong[0]}' is missing or has another shape; weights of the same classifier are needed")
        self.img_model.load_state_dict({n: v if n in last else state.get(n, v) for n, v in own.items()})

    def compose(self, image: Tensor, text: Tensor) -> Tensor:
        """Features (B, embed_dim) of both -> the query's (B, embed_dim)."""
        raise NotImplementedError(type(self).__name__)


class ImageOnly(Composer):
    """The sentence is ignored."""

    def compose(self, image: Tensor, text: Tensor) -> Tensor:
        return image


class TextOnly(Composer):
    """The picture is ignored."""

    def compose(self, image: Tensor, text: Tensor) -> Tensor:
        return text


class Concatenation(Composer):
    """Two dense layers over both features (sec. 4.1)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        wide = 2 * self.embed_dim
        self.composer = nn.Module()
        self.composer.m = nn.Sequential(
            nn.BatchNorm1d(wide),
            nn.ReLU(),
            nn.Linear(wide, wide),
            nn.BatchNorm1d(wide),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(wide, self.embed_dim),
        )

    def compose(self, image: Tensor, text: Tensor) -> Tensor:
        return self.composer.m(torch.cat([image, text], dim=1))


class TIRG(Composer):
    """phi_xt = w_g sigmoid(g(phi_x, phi_t)) * phi_x + w_r r(phi_x, phi_t) (eq. 1 to 3), after the last dense layer.

    `a` holds w_g and w_r, 1 and 10 at first, and two numbers that the released code does not use.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        size = self.embed_dim
        self.a = nn.Parameter(torch.tensor([1.0, 10.0, 1.0, 1.0]))
        self.gated_feature_composer = nn.Sequential(
            Concatenate(), nn.BatchNorm1d(2 * size), nn.ReLU(), nn.Linear(2 * size, size)
        )
        self.res_info_composer = nn.Sequential(
            Concatenate(),
            nn.BatchNorm1d(2 * size),
            nn.ReLU(),
            nn.Linear(2 * size, 2 * size),
            nn.ReLU(),
            nn.Linear(2 * size, size),
        )

    def compose(self, image: Tensor, text: Tensor) -> Tensor:
        gate = self.gated_feature_composer((image, text)).sigmoid()
        return self.a[0] * gate * image + self.a[1] * self.res_info_composer((image, text))


class TIRGLastConv(Composer):
    """The same on the last map of a ResNet, with the sentence's feature at every place; pooling and the dense layer follow."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if (
            not hasattr(self.img_model, "stages")
            or not hasattr(self.img_model, "avgpool")
            or not hasattr(self.img_model, "fc")
        ):
            raise ValueError("backbone: the last map is changed before pooling; a ResNet is needed")
        channels = self.img_model.stage_channels[-1]
        self.a = nn.Parameter(torch.tensor([1.0, 10.0, 1.0, 1.0]))
        self.mod2d = change_map(channels, self.embed_dim)
        self.mod2d_gate = change_map(channels, self.embed_dim)

    def forward(self, images: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = self.img_model.stages(images)[-1]
        text = self.embed_text(tokens, lengths)[:, :, None, None].expand(-1, -1, *x.shape[-2:])
        both = torch.cat([x, text], dim=1)
        x = self.a[0] * self.mod2d_gate(both).sigmoid() * x + self.a[1] * self.mod2d(both)
        return self.img_model.fc(self.img_model.avgpool(x).flatten(1))


def change_map(channels: int, text: int) -> nn.Sequential:
    """(B, channels + text, H, W) -> (B, channels, H, W)."""
    wide = channels + text
    return nn.Sequential(
        nn.BatchNorm2d(wide), nn.Conv2d(wide, wide, 3, padding=1), nn.ReLU(), nn.Conv2d(wide, channels, 3, padding=1)
    )


# -- variants; `options` as `Composer` ---------------------------------------------------------------------------------


def tirg(vocabulary_size: int = 1000, embed_dim: int = 512, **options: Any) -> TIRG:
    """Composed after the last dense layer."""
    return TIRG(vocabulary_size, embed_dim, **options)


def tirg_last_conv(vocabulary_size: int = 1000, embed_dim: int = 512, **options: Any) -> TIRGLastConv:
    """Composed on the last map."""
    return TIRGLastConv(vocabulary_size, embed_dim, **options)


def tirg_concat(vocabulary_size: int = 1000, embed_dim: int = 512, **options: Any) -> Concatenation:
    """Baseline: both features side by side, two layers."""
    return Concatenation(vocabulary_size, embed_dim, **options)


def tirg_image_only(vocabulary_size: int = 1000, embed_dim: int = 512, **options: Any) -> ImageOnly:
    """Baseline: the picture alone."""
    return ImageOnly(vocabulary_size, embed_dim, **options)


def tirg_text_only(vocabulary_size: int = 1000, embed_dim: int = 512, **options: Any) -> TextOnly:
    """Baseline: the sentence alone."""
    return TextOnly(vocabulary_size, embed_dim, **options)
