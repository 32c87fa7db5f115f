"""How golden.safetensors was made: the authors' PyTorch code on weights from a rule, so that none are stored.

git clone https://github.com/justchenhao/BIT_CD FOLDER      # at adcd7ae; needs einops
PYTHONPATH=FOLDER python -m paperzoo.papers.remote_sensing.bit_cd.golden
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

FILE = Path(__file__).with_name("golden.safetensors")
NETWORKS = {  # ours -> the arguments of the authors' classes
    "bit_resnet18": {"resnet_stages_num": 4, "enc_depth": 1, "dec_depth": 8},
    "bit_resnet18_released": {"resnet_stages_num": 4, "enc_depth": 1, "dec_depth": 8, "decoder_dim_head": 8},
    "bit_resnet18_s3": {"resnet_stages_num": 3, "enc_depth": 1, "dec_depth": 8},
    "bit_base_resnet18": {"resnet_stages_num": 5},
}
WATCHED = {  # the authors' names -> ours
    "resnet.conv1": "resnet.conv1",
    "resnet.layer2.1.conv2": "resnet.layer2.1.conv2",
    "conv_pred": "conv_pred",
    "classifier.0": "classifier.0",
    "conv_a": "tokenizer.conv_a",
    "transformer.layers.0.0.fn.fn.to_qkv": "encoder.0.attention.to_qkv",
    "transformer_decoder.layers.0.0.fn.fn.to_q": "decoder.0.attention.to_q",
    "transformer_decoder.layers.7.0.fn.fn.to_v": "decoder.7.attention.to_v",
    "transformer_decoder.layers.7.0.fn.norm": "decoder.7.norm1",
    "transformer_decoder.layers.7.1.fn.fn.net.3": "decoder.7.mlp.2",
}


def pictures() -> tuple[Tensor, Tensor]:
    """Two parts of each of two photographs, normalised, two times (2, 3, 64, 96)."""
    from paperzoo.data.scenes import photographs

    person, cat = photographs()[2], photographs()[3]
    parts = [p[:, y : y + 128 : 2, x : x + 192 : 2] for y, x in ((20, 80), (100, 120)) for p in (person, cat)]
    pixels = (torch.stack(parts).float() / 255 - 0.5) / 0.5
    return pixels[:2], pixels[2:]


def masks() -> Tensor:
    """Ids for the pairs, int64 (2, 64, 96), every seventh row ignored."""
    ids = torch.arange(2 * 64 * 96).view(2, 64, 96) // 300 % 2
    ids[:, ::7] = 255
    return ids


def sampled(gradient: Tensor) -> Tensor:
    return gradient.flatten()[:: max(1, gradient.numel() // 50)].contiguous()


def main() -> None:
    import sys
    import types

    from safetensors.torch import save_file

    from paperzoo.papers.remote_sensing.bit_cd.parity import by_rule

    gone = types.ModuleType("torchvision.models.utils")  # the authors import it; no weights are downloaded here
    gone.load_state_dict_from_url = None
    sys.modules[gone.__name__] = gone
    import models
    import models.networks as theirs

    plain = models.resnet18
    models.resnet18 = lambda pretrained, **options: plain(pretrained=False, **options)  # all weights come from the rule
    stored = {}
    for name, options in NETWORKS.items():
        if name.startswith("bit_base"):
            network = theirs.ResNet(3, 2, **options)
        else:
            network = theirs.BASE_Transformer(3, 2, with_pos="learned", token_len=4, **options)
        network.load_state_dict(by_rule(network.state_dict()))
        with torch.no_grad():
            stored[f"{name}.logits"] = network.eval()(*pictures())[:, :, ::3, ::3].contiguous()
        logits = network.double().train()(*(x.double() for x in pictures()))
        loss = torch.nn.functional.cross_entropy(logits, masks(), ignore_index=255)
        loss.backward()
        stored[f"{name}.loss"] = loss.detach()
        modules = dict(network.named_modules())
        for layer in WATCHED:
            if layer in modules:
                stored[f"{name}.{layer}"] = sampled(modules[layer].weight.grad)
    save_file(stored, str(FILE))


if __name__ == "__main__":
    main()
