"""What captions are worth: exchanged and reversed captions, paired losses, where colours stand."""
import math

import pytest
import torch
from torch.testing import assert_close

from ldm_edu.captions import parse_caption, relation_between
from ldm_edu.data import Scenes
from ldm_edu.probing import caption_losses, colours_placed, mean_and_error, reverse_relation, swap_colours
from ldm_edu.schedule import ScheduleConfig, schedule_from_config

RELATED = [c for c in Scenes(n=300, objects=(2, 2), fields=("caption",)).captions() if parse_caption(c).relation]
TWO_COLOURS = [c for c in RELATED if len({o.colour for o in parse_caption(c).objects}) == 2]


def test_exchanged_colours_keep_everything_else():
    assert len(TWO_COLOURS) > 50
    for caption in TWO_COLOURS:
        before, after = parse_caption(caption), parse_caption(swap_colours(caption))
        assert [o.colour for o in after.objects] == [o.colour for o in before.objects][::-1]
        assert [o.shape for o in after.objects] == [o.shape for o in before.objects] and after.relation == before.relation
        assert swap_colours(swap_colours(caption)) == caption


@pytest.mark.parametrize(("caption", "expected"), [
    ("a blue star above an orange ring", "an orange star above a blue ring"),
    ("a small orange star left of a large blue ring", "a small blue star left of a large orange ring"),
    ("a large orange ring below an orange star", None), ("a red circle", None),
])
def test_articles_follow_the_colours_and_what_cannot_be_exchanged_is_refused(caption, expected):
    if expected is None:
        with pytest.raises(ValueError, match="expected two that differ"):
            swap_colours(caption)
    else:
        assert swap_colours(caption) == expected


def test_a_reversed_relation_turns_two_objects_round():
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for caption in RELATED:
        before, after = parse_caption(caption), parse_caption(reverse_relation(caption))
        assert after.objects == before.objects and after.relation == opposite.get(before.relation, after.relation) != before.relation
        assert reverse_relation(reverse_relation(caption)) == caption
    with pytest.raises(ValueError, match="no relation"):
        reverse_relation("a red circle and a blue square")


def losses_of(net, n=6, batch_size=4, **captions):
    g = torch.Generator().manual_seed(0)
    z, eps, t = torch.randn(n, 4, 4, 4, generator=g), torch.randn(n, 4, 4, 4, generator=g), torch.linspace(0, 999, n).long()
    schedule = schedule_from_config(ScheduleConfig())
    return caption_losses(net, z, captions, schedule, t, eps, "eps", batch_size), (z, t, eps, schedule)


def test_losses_are_those_of_the_told_captions_row_by_row():
    """A network that answers a number for each caption has a loss that can be written down."""
    says = lambda x, t, batch: torch.tensor([float(c) for c in batch["caption"]]).reshape(-1, 1, 1, 1).expand_as(x)
    told = {"own": list("012345"), "another": list("123450")}
    got, (_, _, eps, _) = losses_of(says, **told)
    for name, captions in told.items():
        expected = torch.stack([(e - float(c)).square().mean() for e, c in zip(eps, captions)])
        assert_close(got[name], expected)


def test_all_captions_meet_the_same_noised_latents_at_the_same_steps():
    seen = []

    def note(x, t, batch):
        seen.append((x.clone(), t.clone()))
        return torch.zeros_like(x)

    got, (z, t, eps, schedule) = losses_of(note, own=["a"] * 6, other=["b"] * 6)
    first, second = ([torch.cat(parts) for parts in zip(*seen[i : i + 2])] for i in (0, 2))
    acp = schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], t) and torch.equal(got["own"], got["other"])
    assert_close(first[0], acp.sqrt() * z + (1 - acp).sqrt() * eps)


def test_lists_of_another_length_are_refused():
    with pytest.raises(ValueError, match="captions 'own': got 5, expected 6"):
        losses_of(lambda x, t, batch: x, own=["a"] * 5)


def test_mean_and_its_standard_error():
    assert mean_and_error(torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx((2.5, math.sqrt(5 / 3) / 2))


def test_real_scenes_have_their_colours_in_place_and_exchanged_prompts_do_not():
    pool = Scenes(n=120, objects=(2, 2), split="validation", fields=("image", "caption"))
    rows = [i for i, c in enumerate(pool.captions()) if parse_caption(c).relation and len({o.colour for o in parse_caption(c).objects}) == 2]
    batch = pool.render(rows)
    right = colours_placed(batch["image"], batch["caption"])
    assert len(rows) > 20 and sum(right) >= 0.95 * len(rows)
    for turned in (swap_colours, reverse_relation):
        assert not any(colours_placed(batch["image"], [turned(c) for c in batch["caption"]]))
    both = [swap_colours(reverse_relation(c)) for c in batch["caption"]]
    assert colours_placed(batch["image"], both) == right, "exchanged and reversed is the same picture, whatever the shapes"
    with pytest.raises(ValueError, match="expected"):
        colours_placed(batch["image"][:2], batch["caption"][:1])
    with pytest.raises(ValueError, match="no relation"):
        colours_placed(batch["image"][:1], ["a red circle and a blue square"])
    assert colours_placed(torch.zeros(1, 3, 32, 32), batch["caption"][:1]) == [False]


def test_a_third_object_is_one_too_many():
    """Two colours on their sides are not enough where something else is in the picture."""
    pool = Scenes(n=40, objects=(3, 3), fields=("image", "caption"))
    images, prompts = [], []
    for i in range(len(pool)):
        first, second, third = pool.facts(i)
        side = relation_between(first, second)
        if side is not None and len({o.colour for o in (first, second, third)}) == 3:
            article = {True: "an", False: "a"}
            words = [f"{article[o.colour[0] in 'aeiou']} {o.colour} {o.shape}" for o in (first, second)]
            images.append(pool[i]["image"])
            prompts.append(f"{words[0]} {side} {words[1]}")
    assert len(images) >= 5 and not any(colours_placed(torch.stack(images), prompts))
