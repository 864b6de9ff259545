import pytest
import torch

from whet.kernels.optim import _midpoints, adamw_8bit_, decode_8bit, encode_8bit


@pytest.mark.parametrize("signed", (False, True))
def test_every_number_gets_the_nearest_8bit_code(signed):
    middles = _midpoints(signed, torch.device("cpu"))
    around = torch.cat(
        (middles, middles.nextafter(torch.ones(())), middles.nextafter(-torch.ones(())))
    )
    spread = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) ** 4
    values = torch.cat((around, spread, -spread, torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-38])))
    values = values if signed else values.abs()
    for part in values.split(255):
        whole = torch.cat((part, torch.ones(1)))  # a block whose scale is 1
        codes, scale = encode_8bit(whole, signed=signed)
        assert scale.item() == 1
        assert torch.equal(codes.int(), torch.bucketize(whole, middles, out_int32=True))


def test_adamw_8bit_goes_where_adamw_goes():
    """A quadratic: after 300 steps both have found its minimum."""
    target = torch.randn(700, generator=torch.Generator().manual_seed(1))
    param = torch.zeros(700)
    m, m_scale = encode_8bit(torch.zeros(700), signed=True)
    v, v_scale = encode_8bit(torch.zeros(700), signed=False)
    assert not decode_8bit(m, m_scale, signed=True).any()
    for step in range(1, 301):
        adamw_8bit_(
            param, param - target, m, v, m_scale, v_scale, lr=0.05 * (1 - step / 301), beta1=0.9,
            beta2=0.99, eps=1e-8, weight_decay=0.0, step=step,
        )  # fmt: skip
    assert (param - target).abs().max() < 0.02
