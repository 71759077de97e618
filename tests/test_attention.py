"""Attention: loops = einsum = fused, masks, symmetries, gradients, recording, historical bugs 15, 16 and 18."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm_edu.attention import (
    AttentionBlock,
    CrossAttention,
    FeedForward,
    HalvedLinear,
    SelfAttention,
    SpatialTransformer,
    TransformerBlock,
    attend,
    attention_by_loops,
    attention_weights,
    record_attention,
    repeat_rows,
    split_width,
    zero_init,
)


def qkv(b=2, heads=3, n=5, m=7, d=4, e=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(b, heads, length, width, generator=generator, dtype=torch.float64).to(dtype)
            for length, width in ((n, d), (m, d), (m, e or d))]


@pytest.mark.parametrize("n, m, d", [(1, 1, 1), (5, 7, 4), (16, 16, 8), (3, 1, 2)])
def test_loops_einsum_and_fused_agree(n, m, d):
    q, k, v = qkv(n=n, m=m, d=d, dtype=torch.float64)
    einsum = torch.einsum("b h n m, b h m d -> b h n d", attention_weights(q, k).double(), v)
    fused = attend(q, k, v)
    assert fused.shape == einsum.shape == (2, 3, n, d)
    torch.testing.assert_close(einsum, fused, atol=1e-6, rtol=1e-5)
    for i in range(2):
        for head in range(3):
            torch.testing.assert_close(attention_by_loops(q[i, head], k[i, head], v[i, head]), fused[i, head])


def test_loops_check_shapes():
    with pytest.raises(ValueError, match="k: got shape"):
        attention_by_loops(torch.zeros(3, 4), torch.zeros(3, 5), torch.zeros(3, 4))


def test_scores_of_any_size_are_finite():
    q, k, v = qkv()
    assert torch.isfinite(attend(1e3 * q, 1e3 * k, v)).all()
    assert torch.isfinite(attention_weights(1e3 * q, 1e3 * k)).all()


def test_masked_keys_are_not_read():
    q, k, v = qkv()
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[1, ..., 4:] = False
    out = attend(q, k, v, mask)
    torch.testing.assert_close(out[0], attend(q, k, v)[0])
    torch.testing.assert_close(out[1:], attend(q[1:], k[1:, :, :4], v[1:, :, :4]))
    k[1, :, 4:], v[1, :, 4:] = 1e4, -1e4
    torch.testing.assert_close(attend(q, k, v, mask), out)
    shares = attention_weights(q, k, mask)
    assert torch.equal(shares[1, ..., 4:], torch.zeros(3, 5, 3))


def test_rows_without_any_key_are_zero_not_nan():
    q, k, v = (x.requires_grad_() for x in qkv())
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    mask[0] = False
    out = attend(q, k, v, mask)
    assert torch.equal(out[0], torch.zeros(3, 5, 4)) and torch.isfinite(out).all()
    assert torch.equal(attention_weights(q, k, mask)[0], torch.zeros(3, 5, 7))
    out.sum().backward()
    for x in (q, k, v):
        assert torch.isfinite(x.grad).all() and torch.equal(x.grad[0], torch.zeros_like(x.grad[0]))


def test_cross_attention_of_all_padding_gives_zeros():
    layer = CrossAttention(8, 6, heads=2)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    out = layer(torch.randn(2, 4, 8), torch.randn(2, 3, 6), mask)
    assert out.shape == (2, 4, 8)
    assert torch.equal(out[1], torch.zeros(4, 8)) and out[0].abs().max() > 0


def test_query_masks_broadcast():
    q, k, v = qkv(n=6, m=6)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    shares = attention_weights(q, k, causal)
    assert torch.equal(shares.triu(1), torch.zeros_like(shares))
    torch.testing.assert_close(attend(q, k, v, causal), torch.einsum("b h n m, b h m d -> b h n d", shares, v))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_layers_against_the_loops_head_by_head(heads):
    """Bug 15: heads are contiguous slices of the width, q first, then k, then v."""
    torch.manual_seed(0)
    layer, tokens, context = SelfAttention(8, heads), torch.randn(1, 5, 8), torch.randn(1, 3, 6)
    cross = CrossAttention(8, 6, heads)
    wq, wk, wv = layer.to_qkv.weight.chunk(3)
    cq, (ck, cv) = cross.to_q.weight, cross.to_kv.weight.chunk(2)
    for module, args, weights, source in ((layer, (tokens,), (wq, wk, wv), tokens), (cross, (tokens, context), (cq, ck, cv), context)):
        q, k, v = tokens[0] @ weights[0].T, source[0] @ weights[1].T, source[0] @ weights[2].T
        width = 8 // heads
        slices = [slice(i * width, (i + 1) * width) for i in range(heads)]
        parts = [attention_by_loops(q[:, s], k[:, s], v[:, s]) for s in slices]
        torch.testing.assert_close(module(*args)[0], module.to_out(torch.cat(parts, dim=1)), atol=1e-6, rtol=1e-5)


def test_attention_block_against_the_loops():
    torch.manual_seed(0)
    block = AttentionBlock(8, heads=2, num_groups=4)
    nn.init.normal_(block.proj_out.weight)
    x = torch.randn(1, 8, 3, 2)
    tokens = block.norm(x).flatten(2).transpose(1, 2)[0]
    q, k, v = block.qkv(tokens).chunk(3, dim=1)
    out = torch.cat([attention_by_loops(q[:, s], k[:, s], v[:, s]) for s in (slice(0, 4), slice(4, 8))], dim=1)
    expected = x + block.proj_out(out).T.view(1, 8, 3, 2)
    torch.testing.assert_close(block(x), expected, atol=1e-6, rtol=1e-5)


def test_self_attention_is_permutation_equivariant():
    torch.manual_seed(0)
    layer, tokens, order = SelfAttention(16, head_dim=4), torch.randn(2, 9, 16), torch.randperm(9)
    torch.testing.assert_close(layer(tokens[:, order]), layer(tokens)[:, order], atol=1e-6, rtol=1e-5)


def test_cross_attention_ignores_the_order_of_the_context():
    torch.manual_seed(0)
    layer, tokens, context, order = CrossAttention(16, 6, heads=2), torch.randn(2, 9, 16), torch.randn(2, 5, 6), torch.randperm(5)
    torch.testing.assert_close(layer(tokens, context[:, order]), layer(tokens, context), atol=1e-6, rtol=1e-5)


def test_spatial_transformer_commutes_with_flips():
    torch.manual_seed(0)
    layer = SpatialTransformer(8, 6, heads=2, num_groups=4)
    nn.init.normal_(layer.proj_out.weight)
    x, context = torch.randn(2, 8, 4, 6), torch.randn(2, 3, 6)
    torch.testing.assert_close(layer(x.flip(3), context), layer(x, context).flip(3), atol=1e-5, rtol=1e-5)


def test_spatial_transformer_starts_as_identity_and_keeps_rectangles():
    x = torch.randn(2, 8, 4, 6)
    assert torch.equal(SpatialTransformer(8, 6, heads=2, num_groups=4)(x, torch.randn(2, 3, 6)), x)
    assert torch.equal(AttentionBlock(8, heads=2, num_groups=4)(x), x)


def test_epsilons_of_the_norms():
    """Bug 16: 1e-6 in spatial transformers, 1e-5 in plain attention blocks and in LayerNorm."""
    transformer = SpatialTransformer(8, 6, heads=2, num_groups=4)
    assert transformer.norm.eps == 1e-6
    assert AttentionBlock(8, heads=2, num_groups=4).norm.eps == 1e-5
    assert {m.eps for m in transformer.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}


def test_geglu_against_the_formula():
    torch.manual_seed(0)
    layer, tokens = FeedForward(3), torch.randn(2, 4, 3)
    values, gates = F.linear(tokens, layer.widen.weight, layer.widen.bias).split(12, dim=-1)
    exact = gates * 0.5 * (1 + torch.erf(gates / 2**0.5))
    torch.testing.assert_close(layer(tokens), layer.narrow(values * exact))
    assert sum(p.numel() for p in layer.parameters()) == 3 * 24 + 24 + 12 * 3 + 3


def test_halves_are_those_of_one_product_and_lie_in_one_piece():
    torch.manual_seed(0)
    halved, x = HalvedLinear(5, 8), torch.randn(2, 3, 5, requires_grad=True)
    whole = nn.Linear(5, 8)
    whole.load_state_dict(halved.state_dict())
    halves, chunks = halved(x), whole(x).chunk(2, dim=-1)
    assert all(half.is_contiguous() for half in halves) and not chunks[0].is_contiguous()
    for half, chunk in zip(halves, chunks, strict=True):
        torch.testing.assert_close(half, chunk)
    grads = [torch.autograd.grad(a.square().sum() + b.sin().sum(), (x, layer.weight, layer.bias)) for layer, (a, b) in ((halved, halves), (whole, chunks))]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("heads", [1, 4])
def test_a_single_token_is_read_once_where_nobody_asks_for_gradients(heads):
    """A softmax over one key is 1: the same answers as by the kernel, without queries."""
    torch.manual_seed(0)
    layer, tokens, context = CrossAttention(8, 6, heads), torch.randn(2, 5, 8), torch.randn(2, 1, 6)
    queries = []
    layer.to_q.register_forward_hook(lambda *_: queries.append(1))
    slow = layer(tokens, context)
    assert slow.requires_grad and len(queries) == 1
    with torch.no_grad():
        fast = layer(tokens, context)
        assert len(queries) == 1 and fast.shape == slow.shape
        torch.testing.assert_close(fast, slow)
        padded = layer(tokens, context, torch.tensor([[True], [False]]))  # a mask may say that the one token is padding
        torch.testing.assert_close(padded[0], slow[0])
        assert torch.equal(padded[1], torch.zeros(5, 8)) and len(queries) == 2
        layer(tokens, torch.cat([context, context], dim=1))
        assert len(queries) == 3
        with record_attention(layer) as maps:
            torch.testing.assert_close(layer(tokens, context), slow)
    assert torch.equal(maps[""][0], torch.ones(2, heads, 5, 1)) and len(queries) == 4


def test_transformer_block_is_self_then_cross_then_feed_forward():
    torch.manual_seed(0)
    block, tokens, context = TransformerBlock(8, 6, heads=2), torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    h = tokens + block.self_attention(block.norm_self(tokens))
    h = h + block.cross_attention(block.norm_cross(h), context)
    torch.testing.assert_close(block(tokens, context), h + block.feed_forward(block.norm_ff(h)))
    assert TransformerBlock(8, heads=2).cross_attention is None


def test_a_block_asks_for_the_context_that_it_was_built_for():
    """And passes over one that it was not built for: a UNet gives its context to all blocks, of which `cross_levels` may let some read it."""
    torch.manual_seed(0)
    x, tokens, context = torch.randn(2, 8, 2, 2), torch.randn(2, 4, 8), torch.randn(2, 3, 6)
    for layer, given in ((TransformerBlock(8, 6, heads=2), tokens), (SpatialTransformer(8, 6, heads=2, num_groups=2), x)):
        with pytest.raises(ValueError, match=r"context: got None, expected tokens \(b, m, 6\)"):
            layer(given)
    deaf = TransformerBlock(8, heads=2)
    assert torch.equal(deaf(tokens, context), deaf(tokens))


def test_the_question_for_a_context_breaks_no_graph():
    torch.manual_seed(0)
    block, tokens, context = TransformerBlock(8, 6, heads=2), torch.randn(2, 4, 8), torch.randn(2, 3, 6)
    try:
        whole = torch.compile(block, backend="eager", fullgraph=True)  # raises where the graph would break
        torch.testing.assert_close(whole(tokens, context), block(tokens, context))
    finally:
        torch._dynamo.reset()


def test_several_contexts_share_a_picture_until_they_are_read():
    torch.manual_seed(0)
    layer, x, context = SpatialTransformer(8, 6, heads=2, depth=2, num_groups=2), torch.randn(2, 8, 3, 4), torch.randn(6, 3, 6)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    mask = torch.rand(6, 3) > 0.3
    rows = []
    for module in (layer.blocks[0].self_attention, layer.blocks[0].cross_attention, layer.blocks[1].self_attention):
        module.register_forward_hook(lambda _, inputs, output: rows.append(len(inputs[0])))
    shared = layer(x, context, mask)
    assert rows == [2, 6, 6]
    torch.testing.assert_close(shared, layer(torch.cat([x, x, x]), context, mask))
    torch.testing.assert_close(layer(x, context[:1]), layer(x, context[:1].repeat(2, 1, 1)), msg="one context for all, as ever")
    with pytest.raises(ValueError, match="got 3 rows of context for 2 pictures"):
        layer(x, context[:3])


def test_rows_are_repeated_as_a_whole():
    x = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(repeat_rows(x, 6), torch.cat([x, x, x])) and repeat_rows(x, 2) is x
    assert repeat_rows(x[:0], 0).shape == (0, 3)
    image = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last)
    assert repeat_rows(image, 4).is_contiguous(memory_format=torch.channels_last)
    for rows in (0, 1, 3, -2):
        with pytest.raises(ValueError, match=f"got {rows} rows of context for 2 pictures"):
            repeat_rows(x, rows)
    with pytest.raises(ValueError, match="got 2 rows of context for 0 pictures"):
        repeat_rows(x[:0], 2)


@pytest.mark.parametrize("make", [
    lambda: (SelfAttention(4, 2), [(1, 3, 4)]),
    lambda: (CrossAttention(4, 3, 2), [(1, 3, 4), (1, 2, 3)]),
    lambda: (FeedForward(3, 2), [(1, 2, 3)]),
    lambda: (TransformerBlock(4, 3, 2), [(1, 3, 4), (1, 2, 3)]),
    lambda: (SpatialTransformer(4, 3, 2, num_groups=2), [(1, 4, 2, 2), (1, 2, 3)]),
    lambda: (AttentionBlock(4, 2, num_groups=2), [(1, 4, 2, 2)]),
])
def test_gradients_in_float64(make):
    torch.manual_seed(0)
    module, shapes = make()
    module = module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    args = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(module, args)


@pytest.mark.parametrize("grad", [False, True])
def test_bfloat16_runs_and_stays_close(grad):
    q, k, v = (x.requires_grad_(grad) for x in qkv(n=16, m=16))
    low = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low.float() - attend(q, k, v)).abs().max() < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        layer = TransformerBlock(8, 6, heads=2)
        out = layer(torch.randn(2, 5, 8), torch.randn(2, 3, 6), torch.ones(2, 3, dtype=torch.bool))
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


def test_recording_sums_to_one_and_changes_nothing():
    torch.manual_seed(0)
    layer = SpatialTransformer(8, 6, heads=2, num_groups=4, depth=2)
    nn.init.normal_(layer.proj_out.weight)
    x, context = torch.randn(2, 8, 4, 3), torch.randn(2, 5, 6)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    plain = layer(x, context, mask)
    with record_attention(layer) as maps:
        assert torch.equal(layer(x, context, mask), plain)
        layer(x, context, mask)
    assert sorted(maps) == sorted(f"blocks.{i}.{kind}_attention" for i in range(2) for kind in ("self", "cross"))
    for name, calls in maps.items():
        assert len(calls) == 2
        for shares in calls:
            assert shares.shape == (2, 2, 12, 5 if "cross" in name else 12) and shares.dtype == torch.float32
            assert not shares.requires_grad
            torch.testing.assert_close(shares.sum(-1), torch.ones(2, 2, 12))
    assert torch.equal(maps["blocks.0.cross_attention"][0][1, ..., 3:], torch.zeros(2, 12, 2))


def test_recording_stops_also_after_an_error():
    layer = SelfAttention(8, heads=2)
    with pytest.raises(RuntimeError), record_attention(layer) as maps:
        raise RuntimeError
    layer(torch.randn(1, 3, 8))
    assert maps == {"": []} and layer.recorder is None


@pytest.mark.parametrize("args, message", [
    ((64,), "heads=None and head_dim=None, expected exactly one"),
    ((64, 2, 32), "heads=2 and head_dim=32, expected exactly one"),
    ((64, 3), "heads: got 3, expected a divisor of the width 64"),
    ((64, None, 48), "head_dim: got 48, expected a divisor of the width 64"),
    ((64, 0), "heads: got 0"),
])
def test_head_counts_are_explicit(args, message):
    with pytest.raises(ValueError, match=message):
        split_width(*args)


def test_split_width_and_zero_init():
    assert split_width(64, heads=8) == 8 and split_width(64, head_dim=8) == 8 and split_width(96, head_dim=32) == 3
    assert all(p.abs().sum() == 0 for p in zero_init(nn.Linear(3, 3)).parameters())
