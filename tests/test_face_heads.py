"""Heads of face recognition: margins, full precision, classes spread over processes and sampled by the million."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from paperzoo.papers.face.arcface.technique import ArcFace as ArcFaceLoss
from paperzoo.papers.face.arcface.technique import CombinedMargin, PartialFC
from paperzoo.tasks.face_verification import NormalisedSoftmax

sys.path.insert(0, str(Path(__file__).parent))


def test_losses_stay_in_full_precision_under_autocast():
    head, x, y = ArcFaceLoss(7, 16), torch.randn(5, 16), torch.randint(7, (5,))
    plain = head(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(x, y), plain)
        spread = PartialFC(7, 16)
        spread.load_state_dict(head.state_dict())
        torch.testing.assert_close(spread(x, y), plain)


def test_a_margin_of_zero_is_the_normalised_softmax():
    head, plain = ArcFaceLoss(6, 8, margin=0.0, scale=10.0), NormalisedSoftmax(6, 8, 10.0)
    plain.load_state_dict(head.state_dict())
    x, y = torch.randn(4, 8), torch.randint(6, (4,))
    torch.testing.assert_close(head(x, y), plain(x, y))


def test_margins_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="m1 > 0"):
        CombinedMargin(0.0, 0.5)
    with pytest.raises(ValueError, match="sample_rate"):
        PartialFC(4, 2, sample_rate=0.0)


def test_gradients_are_finite_at_both_poles():
    centres = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    head = ArcFaceLoss(2, 2)
    head.weight.data.copy_(centres)
    x = torch.tensor([[3.0, 0.0], [-2.0, 0.0]], requires_grad=True)
    head(x, torch.tensor([0, 0])).backward()
    assert bool(x.grad.isfinite().all()) and bool(head.weight.grad.isfinite().all())


def test_a_million_identities():
    """Forward, backward and an update with a hundredth of the centres: what is touched is the sample, not the head."""
    from paperzoo.papers.face.arcface.technique import CentresSGD

    head = PartialFC(1_000_000, 16, sample_rate=0.01)
    x, labels = torch.randn(4, 16, requires_grad=True), torch.tensor([0, 999_999, 5, 123_456])
    before = head.weight.detach().clone()
    optimizer = CentresSGD(head, lr=0.1)
    loss = head(x, labels)
    loss.backward()
    gradient = head.weight.grad.coalesce()
    assert gradient.is_sparse and gradient.values().shape == (10_000, 16)
    assert set(labels.tolist()) <= set(gradient.indices()[0].tolist())
    optimizer.step()
    changed = (head.weight.detach() != before).any(1).nonzero().flatten()
    assert len(changed) <= 10_000 and bool(torch.isin(labels, changed).all()) and bool(loss.isfinite())


def test_a_million_identities_on_eight_processes_by_shape():
    with torch.device("meta"):
        parts = [PartialFC(1_000_003, 512, rank=rank, world=8) for rank in range(8)]
    assert sum(part.count for part in parts) == 1_000_003
    assert [part.first for part in parts] == [sum(p.count for p in parts[:i]) for i in range(8)]
    assert max(p.weight.numel() for p in parts) * 4 < 257e6  # bytes a process, of 2 GB


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict:
    """What two processes saw, in one launch."""
    import face_worker

    folder = tmp_path_factory.mktemp("two")
    for k in range(10):
        (folder / "people" / str(k)).mkdir(parents=True)
        for i in range(3):
            pixels = np.full((16, 16, 3), 20 * k + 5 * i, np.uint8)
            Image.fromarray(pixels).save(folder / "people" / str(k) / f"{i}.png")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [face_worker.__file__, str(folder / "found.pt"), str(folder / "people")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "found.pt", weights_only=True) | {"people": str(folder / "people")}


def test_two_processes_have_the_loss_and_gradients_of_one(two):
    import face_worker

    x, labels, centres = face_worker.problem()
    head = ArcFaceLoss(face_worker.CLASSES, face_worker.SIZE)
    head.weight.data.copy_(centres)
    x.requires_grad_(True)
    loss = head(x, labels)
    loss.backward()
    torch.testing.assert_close(two["loss"], loss.detach(), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(two["embeddings"], x.grad, rtol=0, atol=1e-5)
    torch.testing.assert_close(two["centres"], head.weight.grad, rtol=0, atol=1e-5)


def test_two_processes_update_as_torch_does_on_one(two):
    import face_worker

    x, labels, centres = face_worker.problem()
    head = ArcFaceLoss(face_worker.CLASSES, face_worker.SIZE)
    head.weight.data.copy_(centres)
    optimizer = torch.optim.SGD(head.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        head(x, labels).backward()
        optimizer.step()
    torch.testing.assert_close(two["weight"], head.weight.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(two["momentum"], optimizer.state[head.weight]["momentum_buffer"], rtol=1e-5, atol=1e-5)
    assert float(two["restored"]) == 0.0


def test_two_processes_sample_their_own_parts(two):
    assert 5 <= int(two["sampled_rows"]) <= 8  # half of 6 and of 5, more where the batch has more classes


def test_two_processes_train_a_spread_head_as_one(two):
    import face_worker

    recipe, losses, _ = face_worker.trained(two["people"])
    assert two["losses"].tolist() == pytest.approx(losses, rel=1e-3)
    assert recipe.head.count == recipe.head.num_classes == 8


def test_a_spread_head_resumes_bit_for_bit(two):
    assert float(two["resumed"]) == 1.0
