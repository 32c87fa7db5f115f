"""Windows that overlap and are blended give what the network gives of the whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paperzoo.blocks.tiling import profile, tiled


def network(spatial: int, out: int = 2, stride: int = 1, seed: int = 0) -> nn.Module:
    """Two 3-wide convolutions: a receptive field of radius 2 (3 with a stride of 2)."""
    torch.manual_seed(seed)
    conv = nn.Conv2d if spatial == 2 else nn.Conv3d
    return nn.Sequential(conv(1, 4, 3, padding=1), nn.ReLU(), conv(4, out, 3, stride, padding=1)).eval()


@pytest.mark.parametrize("shape, window", [((2, 1, 50, 37), (16, 16)), ((1, 1, 17, 20, 23), (8, 12, 10))])
@pytest.mark.parametrize("blend", ["gaussian", "constant"])
def test_with_a_margin_of_the_receptive_field_the_seams_are_gone(shape, window, blend):
    net, x = network(len(window)), torch.randn(shape)
    found = tiled(net, x, window, overlap=0.5, blend=blend, margin=2)
    torch.testing.assert_close(found, net(x).detach(), atol=1e-5, rtol=1e-5)


def test_without_a_margin_the_seams_are_faint():
    net, x = network(2), torch.randn(1, 1, 64, 64)
    whole = net(x).detach()
    errors = {blend: (tiled(net, x, (32, 32), blend=blend) - whole).abs().max() for blend in ("gaussian", "constant")}
    assert errors["gaussian"] < 0.01 * whole.std() < 0.1 * errors["constant"]


@pytest.mark.parametrize("blend", ["gaussian", "constant"])
@pytest.mark.parametrize("shape, window", [((2, 1, 50, 37), (16, 24)), ((1, 1, 9, 20, 23), (8, 12, 10))])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
def test_agrees_with_monai(shape, window, blend, overlap):
    from monai.inferers import sliding_window_inference

    net, x = network(len(window)), torch.randn(shape)
    weights = torch.ones(())
    for extent in window:
        weights = weights[..., None] * profile(extent, blend).float()
    with torch.no_grad():  # with the same weights; its own have a floor
        expected = sliding_window_inference(x, window, 3, net, overlap=overlap, roi_weight_map=weights)
    torch.testing.assert_close(tiled(net, x, window, overlap, 3, blend), expected, atol=1e-5, rtol=1e-5)


def test_the_gaussian_is_monais_up_to_its_floor():
    from monai.data.utils import compute_importance_map

    theirs = compute_importance_map((20, 33), mode="gaussian", sigma_scale=0.125)
    ours = profile(20, "gaussian")[:, None] * profile(33, "gaussian")
    torch.testing.assert_close(ours.clamp(min=1e-3).float(), theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("padding", ["constant", "reflect", "replicate"])
def test_inputs_smaller_than_a_window_are_padded_as_monai_pads(padding):
    from monai.inferers import sliding_window_inference

    net, x = network(2), torch.randn(1, 1, 13, 40)
    with torch.no_grad():
        expected = sliding_window_inference(x, (20, 16), 2, net, overlap=0.5, padding_mode=padding)
    torch.testing.assert_close(
        tiled(net, x, (20, 16), blend="constant", padding=padding), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("size", [(50, 37), (16, 16), (9, 33)])
def test_a_network_of_stride_2(size):
    net, x = network(2, stride=2), torch.randn(2, 1, *size)
    found, whole = tiled(net, x, (16, 16), margin=4), net(x).detach()
    assert found.shape == whole.shape == (2, 2, -(-size[0] // 2), -(-size[1] // 2))
    # at the border and in padding, zeros before the first convolution are not zeros after it
    torch.testing.assert_close(found[..., 2:-2, 2:-2], whole[..., 2:-2, 2:-2], atol=1e-5, rtol=1e-5)


def test_a_network_that_enlarges():
    def double(x):
        return nn.functional.interpolate(x, scale_factor=2, mode="nearest")

    x = torch.randn(1, 1, 21, 30)
    torch.testing.assert_close(tiled(double, x, (8, 8)), double(x))


def test_the_network_sees_windows_in_batches_only():
    seen = []

    def spy(x):
        seen.append(tuple(x.shape))
        return x

    x = torch.randn(2, 3, 20, 20)
    torch.testing.assert_close(tiled(spy, x, (8, 8), batch_size=5), x)
    assert {s[1:] for s in seen} == {(3, 8, 8)} and max(s[0] for s in seen) == 5
    assert sum(s[0] for s in seen) == 2 * 4 * 4  # each window once: starts 0, 4, 8, 12


def test_one_window_is_one_call():
    net, x = network(2), torch.randn(1, 1, 16, 16)
    torch.testing.assert_close(tiled(net, x, (16, 16)), net(x).detach())


def test_the_result_may_lie_in_a_file(tmp_path):
    net, x = network(3), torch.randn(1, 1, 12, 12, 12)
    path = tmp_path / "logits.bin"
    path.write_bytes(b"\xff" * 999_999)  # an older, longer file does not show
    found = tiled(net, x, (8, 8, 8), memory_map=path)
    torch.testing.assert_close(found, tiled(net, x, (8, 8, 8)))
    assert path.stat().st_size == 4 * 2 * 12**3
    assert torch.equal(torch.from_file(str(path), size=2 * 12**3).view(1, 2, 12, 12, 12), found)


def test_half_precision_is_summed_in_single():
    x = torch.randn(1, 1, 30, 30)
    found = tiled(lambda part: part.bfloat16(), x, (16, 16))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x.bfloat16().float(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"window": (8,)}, "2 spatial axes"),
        ({"window": (8, 0)}, "at least 1"),
        ({"overlap": 1.0}, "below 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"blend": "cosine"}, "'gaussian' or 'constant'"),
        ({"margin": -1}, "at least 0"),
        ({"margin": 3}, "a larger overlap"),
        ({"network": lambda x: {"out": x}}, "training mode"),
        ({"network": lambda x: x[..., :5, :5]}, "5 x 5 of a window of 8 x 8"),
        ({"network": lambda x: x.flatten(1)}, r"\(N, K, \*output\)"),
        ({"inputs": torch.zeros(1, 1, 0, 5)}, "empty"),
        ({"inputs": torch.zeros(1, 1, 2, 20), "padding": "reflect"}, "mirrored"),
    ],
)
def test_wrong_arguments_are_named(change, said):
    arguments = {"network": lambda x: x, "inputs": torch.zeros(1, 1, 20, 20), "window": (8, 8), **change}
    with pytest.raises(ValueError, match=said):
        tiled(**arguments)
