import pytest
import torch
from torch import nn

from dysurgery.errors import UsageError
from dysurgery.nn import DynamicConv2d


def bank(seed=0, **options):
    torch.manual_seed(0)
    static = nn.Conv2d(16, 32, 3).double()
    torch.manual_seed(seed)
    return static, DynamicConv2d.from_static(static, **options)


def test_copies_are_equal_kernels():
    static, layer = bank(k=4)
    for kernel in layer.bank:
        assert torch.equal(kernel.view_as(static.weight), static.weight)


@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("spread", [0.1, 0.5, 2.0])
def test_zero_sum_kernels_differ_by_the_spread_and_average_to_the_weight(k, spread):
    static, layer = bank(k=k, start="zero-sum", spread=spread)
    torch.testing.assert_close(layer.bank.mean(0).view_as(static.weight), static.weight)
    noise = layer.bank - static.weight.reshape(1, -1)
    assert noise.std(dim=1).mean().item() == pytest.approx(spread * static.weight.std().item(), rel=0.03)


def test_under_sigmoids_kernels_are_scaled_to_what_the_weights_sum_to():
    static, layer = bank(k=4, gate="sigmoid")
    torch.testing.assert_close(0.5 * layer.bank.sum(0).view_as(static.weight), static.weight)


def test_copies_under_sigmoids_are_refused_with_the_reason():
    with pytest.raises(UsageError, match="do not sum to 1; use start 'zero-sum'"):
        bank(k=4, gate="sigmoid", start="copies")


def test_an_unknown_start_is_an_error_with_near_names():
    with pytest.raises(UsageError, match="did you mean 'copies'"):
        bank(k=4, start="copis")


def test_the_same_seed_gives_the_same_bank_and_another_seed_another():
    first, again, other = (bank(seed, k=4, start="zero-sum")[1].bank for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("start", ["copies", "zero-sum"])
def test_a_single_kernel_is_the_weight_itself(start):
    static, layer = bank(k=1, start=start)
    torch.testing.assert_close(layer.bank.view_as(static.weight), static.weight)


def test_a_layer_without_storage_stays_without():
    with torch.device("meta"):
        layer = DynamicConv2d.from_static(nn.Conv2d(4, 6, 3), k=4, start="zero-sum")
    assert all(t.is_meta for t in layer.state_dict().values())


@pytest.mark.parametrize("options", [{"k": 0}, {"k": 4, "reduction": 0}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(UsageError, match="at least 1"):
        bank(**options)


def test_a_fresh_layer_has_independent_kernels_of_the_usual_size():
    layer, static = DynamicConv2d(16, 32, 3, k=4), nn.Conv2d(16, 32, 3)
    assert layer.bank.std().item() == pytest.approx(static.weight.std().item(), rel=0.05)
    assert torch.corrcoef(layer.bank.detach()).fill_diagonal_(0).abs().max() < 0.1
