"""ASTER: An Attentional Scene Text Recognizer with Flexible Rectification (Shi et al., TPAMI 2019).

A small network finds control points along the upper and lower edge of the text; a thin-plate spline through them straightens the
picture; a residual network with two bidirectional LSTMs makes a sequence of features of it, which two attentional decoders read,
one from left to right and one from right to left (fig. 2).

Tokens are numbered as in `paperzoo.blocks.sequence_decoding`, which is also the numbering of the most used PyTorch code
(ayumiymk/aster.pytorch), whose parameter names are kept: `encoder.layer1.0.conv1.weight`, `decoder.decoder.fc.weight`. That code
has one decoder, from left to right, with a GRU (`aster_l2r_gru`); the authors' code in TensorFlow has the paper's two with LSTMs,
which is `aster`. `from_official` takes the first one's checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperzoo.blocks.precision import full_precision
from paperzoo.blocks.sequence_decoding import (
    END,
    PAD,
    START,
    State,
    beam_search_steps,
    greedy_steps,
    read_greedy,
    sequence_cross_entropy,
)
from paperzoo.papers.classification.spatial_transformer.technique import (
    ThinPlateSpline,
    bending,
    output_points,
    sample,
)

# -- rectification (sec. 3.1) --------------------------------------------------------------------------------------------


def border_points(count: int, margin: float) -> Tensor:
    """Half of the points along the upper border, half along the lower, from left to right: (count, 2), x and y in 0 … 1."""
    x = torch.linspace(margin, 1 - margin, count // 2, dtype=torch.float64)
    upper, lower = torch.stack([x, torch.full_like(x, margin)], 1), torch.stack([x, torch.full_like(x, 1 - margin)], 1)
    return torch.cat([upper, lower])


class BorderSpline(ThinPlateSpline):
    """The spline from control points on the borders of the output to those that were found in the input (sec. 3.1.2).

    As its base class, in coordinates from -1 to 1; only the control points lie elsewhere.
    """

    def __init__(self, count: int, margin: float) -> None:
        nn.Module.__init__(self)
        if count < 4 or count % 2:
            raise ValueError(f"num_control_points is even and at least 4, got {count}")
        control = 2 * border_points(count, margin) - 1
        flat = torch.cat([torch.ones(count, 1, dtype=torch.float64), control], dim=1)
        corner = torch.zeros(3, 3, dtype=torch.float64)
        system = torch.cat([torch.cat([bending(control, control), flat], 1), torch.cat([flat.T, corner], 1)])  # Delta_C
        self.register_buffer("control", control.float(), persistent=False)
        self.register_buffer("solution", torch.linalg.inv(system)[:, :count].float(), persistent=False)


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class ControlPoints(nn.Module):
    """The localisation network: pictures (B, in_channels, H, W), scaled to `size` -> points (B, count, 2), x and y from 0 to 1.

    The last layer has zero weights and a bias that places the points along the borders, else training fails (sec. 3.1.1);
    points may lie outside of the picture.
    """

    def __init__(
        self, in_channels: int, count: int, margin: float, widths: Sequence[int], hidden: int, size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.size = tuple(size)
        layers: list[nn.Module] = []
        for i, width in enumerate(widths):
            layers += ([nn.MaxPool2d(2)] if i else []) + [convolution(in_channels if i == 0 else widths[i - 1], width)]
        self.stn_convnet = nn.Sequential(*layers)
        scale = 2 ** (len(widths) - 1)
        self.stn_fc1 = nn.Sequential(
            nn.Linear(widths[-1] * (size[0] // scale) * (size[1] // scale), hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
        )
        self.stn_fc2 = nn.Linear(hidden, 2 * count)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.stn_fc1[0].weight, std=0.001)
        nn.init.zeros_(self.stn_fc1[0].bias)
        nn.init.zeros_(self.stn_fc2.weight)
        with torch.no_grad():
            self.stn_fc2.bias.copy_(border_points(count, margin).flatten())

    def forward(self, x: Tensor) -> Tensor:
        small = F.interpolate(x, self.size, mode="bilinear", align_corners=True)
        features = self.stn_fc1(self.stn_convnet(small).flatten(1))
        return self.stn_fc2(0.1 * features).unflatten(1, (-1, 2))  # the tenth is released code's, not the paper's


# -- encoder (sec. 3.2.1) ------------------------------------------------------------------------------------------------


class AsterBlock(nn.Module):
    """A residual block of a 1 x 1 and a 3 x 3 convolution (table 1)."""

    def __init__(self, inputs: int, outputs: int, stride: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != (1, 1) or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(branch + (x if self.downsample is None else self.downsample(x)))


def initialise(rnn: nn.RNNBase) -> None:
    """As the authors' code: orthogonal matrices, no biases but a forget gate's, which is 1."""
    for name, parameter in rnn.named_parameters():
        if parameter.ndim == 2:
            for gate in parameter.detach().chunk(len(parameter) // rnn.hidden_size):
                nn.init.orthogonal_(gate)
        else:
            nn.init.zeros_(parameter)
            if isinstance(rnn, nn.LSTM) and name.startswith("bias_ih"):
                nn.init.ones_(parameter.detach().chunk(4)[1])


class BidirectionalLSTM(nn.Module):
    """A layer of LSTMs in both directions, and a linear map of their concatenated outputs. (B, T, inputs) -> (B, T, outputs)."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(inputs, hidden, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * hidden, outputs)
        nn.init.kaiming_normal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.rnn(x)[0])


class AsterEncoder(nn.Module):
    """Pictures (B, in_channels, 32, W) -> a sequence of features (B, W / 4, out_planes).

    Args:
        widths: channels of the stem and of five stages. depths: blocks of each stage.
        hidden: of the LSTMs in each direction.
        project: a linear map to `hidden` behind each layer of LSTMs, as the paper has it; else both directions go on.
    """

    def __init__(
        self, in_channels: int, widths: Sequence[int], depths: Sequence[int], hidden: int, project: bool
    ) -> None:
        super().__init__()
        self.layer0 = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )  # fmt: skip
        strides = [(2, 2), (2, 2), (2, 1), (2, 1), (2, 1)]  # the width is kept: neighbours stay apart
        for i, (depth, stride) in enumerate(zip(depths, strides, strict=True)):
            blocks = [AsterBlock(widths[i] if k == 0 else widths[i + 1], widths[i + 1], stride if k == 0 else (1, 1))
                      for k in range(depth)]  # fmt: skip
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        if project:
            first, second = BidirectionalLSTM(widths[5], hidden, hidden), BidirectionalLSTM(hidden, hidden, hidden)
            self.rnn, self.out_planes = nn.Sequential(first, second), hidden
        else:
            self.rnn = nn.LSTM(widths[5], hidden, num_layers=2, bidirectional=True, batch_first=True)
            self.out_planes = 2 * hidden
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.LSTM):
                initialise(module)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(6):
            x = getattr(self, f"layer{i}")(x)
        x = x.squeeze(2).transpose(1, 2)
        return self.rnn(x)[0] if isinstance(self.rnn, nn.LSTM) else self.rnn(x)


# -- decoders (sec. 3.2.2) -----------------------------------------------------------------------------------------------


class AttentionUnit(nn.Module):
    """e_{t,i} = w^T tanh(W s_{t-1} + V h_i + b), and a softmax over i (sec. 3.2.2)."""

    def __init__(self, state_size: int, in_planes: int, size: int) -> None:
        super().__init__()
        self.sEmbed = nn.Linear(state_size, size)
        self.xEmbed = nn.Linear(in_planes, size)
        self.wEmbed = nn.Linear(size, 1)
        for layer in (self.sEmbed, self.xEmbed):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.uniform_(self.wEmbed.weight, -((3 / size) ** 0.5), (3 / size) ** 0.5)

    def forward(self, projected: Tensor, state: Tensor) -> Tensor:
        """V h + b (B, N, size), s (B, state_size) -> weights (B, N)."""
        return self.wEmbed(torch.tanh(self.sEmbed(state)[:, None] + projected))[..., 0].softmax(1)


class OneHot(nn.Module):
    """f(y) of sec. 3.2.2: the embedding without weights."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = self.embedding_dim = count

    def forward(self, tokens: Tensor) -> Tensor:
        return F.one_hot(tokens, self.count).float()


class DecoderUnit(nn.Module):
    """One step: attend with the state before, then (x_t, s_t) = rnn(s_{t-1}, (f(y_{t-1}), g_t)), then logits (sec. 3.2.2).

    Args:
        classes: K + 3 outputs; K + 4 inputs, the last one starts a text.
        cell: "lstm" with one-hot inputs (paper, and the authors' code), or "gru" with embedded ones.
    """

    def __init__(self, classes: int, in_planes: int, state_size: int, attention_size: int, cell: str) -> None:
        super().__init__()
        self.attention_unit = AttentionUnit(state_size, in_planes, attention_size)
        self.tgt_embedding = OneHot(classes + 1) if cell == "lstm" else nn.Embedding(classes + 1, attention_size)
        inputs = in_planes + self.tgt_embedding.embedding_dim
        if cell == "lstm":
            self.lstm = nn.LSTM(inputs, state_size, batch_first=True)
            initialise(self.lstm)
        else:
            self.gru = nn.GRU(inputs, state_size, batch_first=True)
        self.state_size, self.cell = state_size, cell
        self.fc = nn.Linear(state_size, classes)
        nn.init.kaiming_normal_(self.fc.weight, nonlinearity="linear")
        nn.init.zeros_(self.fc.bias)

    def start(self, features: Tensor) -> State:
        """What the steps need of features (B, N, in_planes); V h is the same in all of them."""
        zeros = features.new_zeros(features.shape[0], self.state_size)
        state = {"features": features, "projected": self.attention_unit.xEmbed(features), "hidden": zeros}
        return state | ({"memory": zeros} if self.cell == "lstm" else {})

    def advance(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Tokens int64 (B,) -> logits (B, classes) of what follows, and the state after."""
        weights = self.attention_unit(state["projected"], state["hidden"])
        glimpse = (weights[:, None] @ state["features"])[:, 0]
        inputs = torch.cat([self.tgt_embedding(tokens).to(glimpse.dtype), glimpse], 1)
        # a single step, so the cell's function with the layer's parameters
        rnn = self.lstm if self.cell == "lstm" else self.gru
        parameters = (rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0)
        if self.cell == "lstm":
            hidden, memory = torch.lstm_cell(inputs, (state["hidden"], state["memory"]), *parameters)
            state = state | {"hidden": hidden, "memory": memory}
        else:
            hidden = torch.gru_cell(inputs, state["hidden"], *parameters)
            state = state | {"hidden": hidden}
        return self.fc(hidden), state


class AttentionHead(nn.Module):
    """A decoder over whole texts."""

    def __init__(self, num_classes: int, in_planes: int, state_size: int, attention_size: int, cell: str) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.decoder = DecoderUnit(num_classes + 3, in_planes, state_size, attention_size, cell)

    def forced(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Logits (B, T, K + 3), each step given the true characters before it: tokens int64 (B, T)."""
        state, found = self.decoder.start(features), []
        before = F.pad(tokens[:, :-1], (1, 0), value=self.num_classes + START)
        for t in range(tokens.shape[1]):
            logits, state = self.decoder.advance(before[:, t], state)
            found.append(logits)
        return torch.stack(found, 1)

    def starts(self, features: Tensor) -> Tensor:
        return torch.full((features.shape[0],), self.num_classes + START, device=features.device)

    def greedy(self, features: Tensor, steps: int) -> Tensor:
        """Logits (B, steps, K + 3), each step given the most probable character before it."""
        return greedy_steps(self.decoder.advance, self.decoder.start(features), self.starts(features), steps)

    def search(self, features: Tensor, steps: int, beam_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """The best text of a beam search: tokens (B, T), their probabilities (B, T), log-probability (B,)."""
        end, pad = self.num_classes + END, self.num_classes + PAD
        state = self.decoder.start(features)
        found = beam_search_steps(
            self.decoder.advance, state, self.starts(features), steps, end, pad, min(beam_size, self.num_classes)
        )
        return tuple(x[:, 0] for x in found)


def reversed_texts(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Texts backwards; the end and the padding stay behind. tokens int64 (B, T), lengths int64 (B,)."""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return tokens.gather(1, torch.where(places < lengths[:, None], lengths[:, None] - 1 - places, places))


# -- the network ---------------------------------------------------------------------------------------------------------


class ASTER(nn.Module):
    """Pictures (B, in_channels, H, W) of any size -> logits of each decoder (B, max_length + 1, K + 3), left to right first.

    See `paperzoo.tasks.text_recognition` for the members.

    Args:
        num_classes: K, the characters.
        max_length: the most characters of a text; as many steps and one for its end are decoded.
        cell: "lstm" or "gru", see `DecoderUnit`.
        bidirectional: a second decoder, from right to left.
        margin: distance of the spline's points from the border of the straightened picture, in parts of its sides.
        first_margin: the same of the points that a fresh network finds; equal, a fresh network straightens nothing.
        in_channels: of the pictures. The rest are sizes.
    """

    def __init__(
        self,
        num_classes: int = 94,
        in_channels: int = 3,
        max_length: int = 25,
        cell: str = "lstm",
        bidirectional: bool = True,
        state_size: int = 256,
        attention_size: int = 256,
        hidden: int = 256,
        project: bool = True,
        margin: float = 0.0,
        first_margin: float = 0.0,
        num_control_points: int = 20,
        widths: Sequence[int] = (32, 32, 64, 128, 256, 512),
        depths: Sequence[int] = (3, 4, 6, 6, 3),
        locating_widths: Sequence[int] = (32, 64, 128, 256, 256, 256),
        locating_hidden: int = 512,
        locating_size: tuple[int, int] = (32, 64),
        output_size: tuple[int, int] = (32, 100),
    ) -> None:
        super().__init__()
        if output_size[0] != 32:
            raise ValueError(f"output_size is 32 rows high, as the encoder's strides want it, got {output_size[0]}")
        self.num_classes, self.in_channels, self.max_length = num_classes, in_channels, max_length
        self.output_size = tuple(output_size)
        self.encoder = AsterEncoder(in_channels, widths, depths, hidden, project)
        self.sizes = (self.encoder.out_planes, state_size, attention_size, cell)
        self.decoder = AttentionHead(num_classes, *self.sizes)
        self.decoder_reversed = AttentionHead(num_classes, *self.sizes) if bidirectional else None
        self.tps = BorderSpline(num_control_points, margin)
        self.stn_head = ControlPoints(
            in_channels, num_control_points, first_margin, locating_widths, locating_hidden, locating_size
        )

    def rectify(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The straightened pictures (B, in_channels, 32, 100), and the control points."""
        points = self.stn_head(images)
        with full_precision(images):  # reduced precision would move places by pixels
            exact = points.to(torch.promote_types(points.dtype, torch.float32))
            grid = self.tps(2 * exact - 1, output_points(*self.output_size, exact))
        grid = grid.clamp(-1, 1).unflatten(1, self.output_size)
        return sample(images, grid), points

    def features(self, images: Tensor) -> Tensor:
        return self.encoder(self.rectify(images)[0])

    def forward(
        self, images: Tensor, targets: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, ...] | dict[str, Tensor]:
        """Raw outputs, or with targets the losses: the sum over a text, averaged over texts, half of it from each decoder."""
        features = self.features(images)
        if targets is None:
            return tuple(head.greedy(features, self.max_length + 1) for head in self.heads)
        tokens, lengths = targets["tokens"], targets["lengths"]
        texts = [tokens, reversed_texts(tokens, lengths)]
        losses = {}
        for name, head, text in zip(("left_to_right", "right_to_left"), self.heads, texts, strict=False):
            loss = sequence_cross_entropy(head.forced(features, text), text, lengths)
            losses[name] = loss / len(self.heads)
        return losses

    @property
    def heads(self) -> list[AttentionHead]:
        return [self.decoder] if self.decoder_reversed is None else [self.decoder, self.decoder_reversed]

    def decode(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        return self.choose([read_greedy(x, self.num_classes + END, self.num_classes + PAD) for x in outputs])

    def search(self, images: Tensor, beam_size: int = 5) -> tuple[Tensor, Tensor, Tensor]:
        """Beam search by each decoder; the paper has five beams."""
        features = self.features(images)
        return self.choose([head.search(features, self.max_length + 1, beam_size) for head in self.heads])

    def choose(self, found: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Of each picture the text with the higher log-probability; that from right to left is turned round."""
        if len(found) == 1:
            return found[0]
        (one, p_one, total_one), (two, p_two, total_two) = found
        width = max(one.shape[1], two.shape[1])
        pad = self.num_classes + PAD
        one, two = (F.pad(x, (0, width - x.shape[1]), value=pad) for x in (one, two))
        p_one, p_two = (F.pad(x, (0, width - x.shape[1]), value=1.0) for x in (p_one, p_two))
        ended = ((two == self.num_classes + END) | (two == pad)).long()
        lengths = width - (ended.cumsum(1) > 0).long().sum(1)
        two, p_two = reversed_texts(two, lengths), reversed_texts(p_two, lengths)
        first = total_one >= total_two
        return (
            torch.where(first[:, None], one, two), torch.where(first[:, None], p_one, p_two),
            torch.where(first, total_one, total_two),
        )  # fmt: skip

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh decoders for other characters."""
        like, self.num_classes = self.decoder.decoder.fc.weight, num_classes
        self.decoder = AttentionHead(num_classes, *self.sizes).to(like)
        if self.decoder_reversed is not None:
            self.decoder_reversed = AttentionHead(num_classes, *self.sizes).to(like)


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of ayumiymk/aster.pytorch: the spline's tables, which it stores, are left out."""
    return {name: value for name, value in state.items() if not name.startswith("tps.")}


# -- variants ------------------------------------------------------------------------------------------------------------


def aster(num_classes: int = 94, in_channels: int = 3, max_length: int = 25) -> ASTER:
    """The paper's network: decoders of 256 units in both directions."""
    return ASTER(num_classes, in_channels, max_length)


def aster_l2r_gru(num_classes: int = 94, in_channels: int = 3, max_length: int = 99) -> ASTER:
    """That of ayumiymk/aster.pytorch: one decoder, from left to right, a GRU of 512 units; its checkpoints load."""
    return ASTER(
        num_classes, in_channels, max_length, cell="gru", bidirectional=False, state_size=512, attention_size=512,
        project=False, margin=0.05, first_margin=0.01,
    )  # fmt: skip


def aster_tiny(num_classes: int = 10, in_channels: int = 3, max_length: int = 6, width: int = 100) -> ASTER:
    """A small one for short texts. `width` is that of the straightened picture."""
    return ASTER(
        num_classes, in_channels, max_length, state_size=96, attention_size=96, hidden=96,
        widths=(8, 16, 32, 64, 64, 96), depths=(1, 1, 1, 1, 1), output_size=(32, width),
        locating_widths=(8, 16, 24, 32, 32), locating_hidden=64, locating_size=(16, 32),
    )  # fmt: skip
