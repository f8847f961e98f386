"""Mixing: neighbours only, lambda equal to the share really kept, and bit for bit the same however a batch is divided."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.data.mixup import mixup_target

from taylorvit.config import AugmentConfig
from taylorvit.data import Mixer, check_mixing, is_mixing

G, K = 24, 7
CUTMIX = AugmentConfig(cutmix_alpha=1.0, mixup_alpha=0.0, label_smoothing=0.1)
MIXUP = AugmentConfig(cutmix_alpha=0.0, mixup_alpha=0.8, label_smoothing=0.1)
BOTH = AugmentConfig(cutmix_alpha=1.0, mixup_alpha=0.8, mix_prob=0.7, label_smoothing=0.1)


def batch(size: int = G, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, 9, 12, generator=generator).to(dtype), torch.arange(size) % K


def mix(config: AugmentConfig, images, labels, *, seed=0, epoch=1, update=2, offset=0):
    mixer = Mixer(config, num_classes=K, seed=seed)
    return mixer(images, labels, epoch=epoch, update=update, offset=offset, global_batch_size=G)


@pytest.mark.parametrize("config", [CUTMIX, MIXUP, BOTH])
@pytest.mark.parametrize("micro", [2, 4, 8, 12])
def test_processes_and_accumulation_mix_the_same_bits(config, micro):
    images, labels = batch()
    whole = mix(config, images, labels)
    parts = [mix(config, images[at : at + micro], labels[at : at + micro], offset=at) for at in range(0, G, micro)]
    for number in (0, 1):
        assert torch.equal(whole[number], torch.cat([part[number] for part in parts]))


@pytest.mark.parametrize("config", [CUTMIX, MIXUP, BOTH])
def test_input_untouched_and_every_position_has_its_own_draw(config):
    images, labels = batch()
    before = images.clone(), labels.clone()
    first = mix(config, images, labels)[1]
    assert torch.equal(images, before[0])
    assert torch.equal(labels, before[1])
    same = torch.zeros(G, dtype=torch.long)
    same[1::2] = 1  # all pairs alike, so that only lambda differs between them
    lam = mix(config, images, same)[1][::2, 0]
    assert len(set(lam.tolist())) >= G // 4  # box areas are whole pixels, so two may agree; unmixed pairs do
    for change in ({"seed": 1}, {"epoch": 2}, {"update": 3}):
        assert not torch.equal(first, mix(config, images, labels, **change)[1])
    assert torch.equal(first, mix(config, images, labels)[1])


def test_cutmix_swaps_a_box_between_neighbours_and_lambda_is_the_share_kept():
    images, labels = batch()
    config = AugmentConfig(cutmix_alpha=1.0, label_smoothing=0.0)
    mixed, targets = mix(config, images, labels)
    partner = torch.arange(G) ^ 1
    own, other = (mixed == images).all(dim=1), (mixed == images[partner]).all(dim=1)  # (G, H, W)
    assert (own | other).all()
    areas = set()
    for i in range(G):
        rows, columns = other[i].any(dim=1).sum(), other[i].any(dim=0).sum()
        assert other[i].sum() == rows * columns  # a rectangle
        assert torch.equal(other[i], other[i ^ 1])  # the same in both partners
        kept = own[i].double().mean().item()
        assert targets[i, labels[i]].item() == pytest.approx(kept, abs=1e-6)
        assert targets[i, labels[i ^ 1]].item() == pytest.approx(1 - kept, abs=1e-6)
        areas.add(int(other[i].sum()))
    assert len(areas) > 4


def test_mixup_blends_neighbours_by_the_lambda_of_the_targets():
    images, labels = batch()
    config = AugmentConfig(cutmix_alpha=0.0, mixup_alpha=0.8, label_smoothing=0.0)
    mixed, targets = mix(config, images, labels)
    lam = targets[torch.arange(G), labels][:, None, None, None]
    assert torch.allclose(mixed, lam * images + (1 - lam) * images[torch.arange(G) ^ 1], atol=1e-6)
    assert lam.std() > 0.02


def test_targets_equal_timms():
    images, labels = batch(2)
    targets = mix(MIXUP, images, labels)[1]
    lam = (targets[0, labels[0]] - 0.1 / K) / 0.9
    assert torch.allclose(targets[:1], mixup_target(labels, K, lam.item(), smoothing=0.1)[:1], atol=1e-6)
    assert torch.allclose(targets.sum(dim=1), torch.ones(2))


def test_without_mixing_labels_are_smoothed_and_images_are_returned_as_they_are():
    images, labels = batch(5)  # an odd number is allowed then
    for off in (AugmentConfig(cutmix_alpha=0.0), AugmentConfig(cutmix_alpha=1.0, mix_prob=0.0)):
        mixed, targets = mix(off, images, labels)
        assert mixed is images
        assert torch.allclose(targets, mixup_target(labels, K, 1.0, smoothing=0.1), atol=1e-7)
        assert not is_mixing(off)


def test_shares_of_mixed_pairs_and_of_cutmix_follow_the_config():
    config = AugmentConfig(cutmix_alpha=1.0, mixup_alpha=1.0, mix_prob=0.6, mix_switch_prob=0.25)
    drawn = Mixer(config, num_classes=K, seed=0)._draw(0, 0, 20_000)
    assert drawn.use_cutmix.mean() == pytest.approx(0.6 * 0.25, abs=0.01)
    assert drawn.use_mixup.mean() == pytest.approx(0.6 * 0.75, abs=0.01)
    assert not (drawn.use_cutmix & drawn.use_mixup).any()
    assert drawn.lam[drawn.use_mixup].mean() == pytest.approx(0.5, abs=0.01)
    assert (drawn.lam[~drawn.use_mixup & ~drawn.use_cutmix] == 1).all()
    skewed = Mixer(AugmentConfig(cutmix_alpha=0.0, mixup_alpha=0.2), num_classes=K, seed=0)._draw(0, 0, 20_000)
    assert skewed.lam.var() == pytest.approx(1 / (4 * (2 * 0.2 + 1)), abs=0.005)  # variance of Beta(a, a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [CUTMIX, BOTH])
def test_dtypes_and_memory_format_are_kept(config, dtype):
    images, labels = batch(dtype=dtype)
    mixed, targets = mix(config, images, labels)
    assert mixed.dtype == dtype
    assert targets.dtype == torch.float32
    last = images.to(memory_format=torch.channels_last)
    assert torch.equal(mix(config, last, labels)[0], mixed)


def test_an_odd_micro_batch_is_refused_only_where_pairs_are_mixed():
    check_mixing(CUTMIX, 4)
    check_mixing(AugmentConfig(cutmix_alpha=0.0), 3)
    with pytest.raises(ValueError, match="train.micro_batch_size is 3.*must be even"):
        check_mixing(CUTMIX, 3)
    with pytest.raises(ValueError, match="train.micro_batch_size is 5"):
        mix(CUTMIX, *batch(5))


def test_one_pixel_images_are_mixed_without_a_fault():
    images, labels = torch.randn(G, 1, 1, 1), torch.arange(G) % K
    mixed, targets = mix(BOTH, images, labels)
    assert mixed.isfinite().all()
    assert np.allclose(targets.sum(dim=1), 1)
