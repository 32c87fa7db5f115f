"""Strides that become dilations: the same weights, a larger map."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paperzoo.blocks.dilation import dilate, dilated_backbone
from paperzoo.papers.classification.resnet.model import resnet50
from paperzoo.papers.segmentation.pspnet.model import SlimResNet


def geometry(network: nn.Module) -> dict:
    return {name: (m.stride, m.padding, m.dilation) for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}


@pytest.mark.parametrize("stride, replaced", [(16, [False, False, True]), (8, [False, True, True])])
def test_a_resnet_is_dilated_as_torchvision_does(stride, replaced):
    from torchvision.models import resnet50 as reference

    with torch.device("meta"):
        ours, theirs = dilate(resnet50(), stride), reference(replace_stride_with_dilation=replaced)
    assert geometry(ours) == geometry(theirs)
    assert ours.stage_strides == [4, 8, min(16, stride), stride]


@pytest.mark.parametrize("whole_stage", [False, True])
def test_every_fourth_position_is_the_strided_networks(whole_stage):
    torch.manual_seed(0)
    strided = SlimResNet(widths=(4, 4, 6, 8, 8)).eval()
    dense = dilate(SlimResNet(widths=(4, 4, 6, 8, 8)), 4, whole_stage=whole_stage).eval()
    dense.load_state_dict(strided.state_dict())
    x = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        equal = torch.allclose(dense.stages(x)[-1][:, :, ::4, ::4], strided.stages(x)[-1], atol=1e-5)
    assert equal == (not whole_stage)  # only the one custom is exact


def test_whole_stage_dilates_the_first_block_as_well():
    with torch.device("meta"):
        network = dilate(resnet50(), 8, whole_stage=True)
    rates = [{block.conv2.dilation for block in getattr(network, f"layer{i}")} for i in (1, 2, 3, 4)]
    assert rates == [{(1, 1)}, {(1, 1)}, {(2, 2)}, {(4, 4)}]


def test_a_larger_stride_than_the_networks_changes_nothing():
    with torch.device("meta"):
        assert geometry(dilate(resnet50(), 32)) == geometry(resnet50())


def test_backbones_by_name():
    backbone = dilated_backbone("efficientnet_b0", 16)
    assert backbone.strides == backbone.stage_strides == [2, 4, 8, 16, 16]
    maps = backbone.eval()(torch.randn(1, 3, 64, 96))
    assert [m.shape[-2:] for m in maps] == [torch.Size((64 // s, 96 // s)) for s in backbone.strides]


def test_what_cannot_be_dilated_is_refused():
    with pytest.raises(ValueError, match="power of two"):
        dilate(resnet50(), 12)
    with pytest.raises(ValueError, match="backbone convnext_tiny: cannot be dilated"):
        dilated_backbone("convnext_tiny", 8)
