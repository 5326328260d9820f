"""Wrong signs, wrong clips and wrong normalisers do not crash; they train the wrong way. Closed forms, gradients
by hand and by finite differences, and sums that must not depend on how a batch is cut.
"""

import itertools

import pytest
import torch

from ivt_agents.grpo.losses import (
    CLIPS,
    LOSSES,
    PER_SEQUENCE,
    clipped_loss,
    clipped_sides,
    denominator,
    k3,
    kl_loss,
    kl_penalty,
    lengths,
    sequence_ratio,
)

LENGTHS = (3, 1, 5, 2)


def clipped(*values) -> float:
    """Tokens that the clip acts on, at either bound."""
    return float(sum(clipped_sides(*values)))


def batch(seed: int = 0, spread: float = 0.3):
    """New and old log-probabilities, advantages (one for each sequence) and sequences of 11 tokens."""
    generator = torch.Generator().manual_seed(seed)
    sequence = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    old = -3 * torch.rand(len(sequence), generator=generator, dtype=torch.float64)
    new = old + spread * torch.randn(len(sequence), generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.0, -0.5, 0.25, -2.0], dtype=torch.float64)[sequence]
    return new, old, advantages, sequence


def by_hand(loss, new, old, advantages, sequence, low, high):
    """The formulas, one sequence and one token after the other, in plain Python."""
    total = 0.0
    for s in range(int(sequence.max()) + 1):
        here = [i for i in range(len(sequence)) if int(sequence[i]) == s]
        log_ratios = [float(new[i] - old[i]) for i in here]
        mean_ratio = torch.tensor(sum(log_ratios) / len(here), dtype=torch.float64).exp().item()
        inner = 0.0
        for i, log_ratio in zip(here, log_ratios, strict=True):
            a, r = float(advantages[i]), torch.tensor(log_ratio, dtype=torch.float64).exp().item()
            if loss == "gspo":
                r = mean_ratio
            capped = min(max(r, 1 - low), 1 + high)
            inner += capped * a * float(new[i]) if loss == "cispo" else min(r * a, capped * a)
        total += inner / len(here) if loss in ("grpo", "gspo") else inner
    return -total


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("spread", [0.0, 1e-4, 0.3, 2.0])
def test_every_loss_is_its_formula(loss, spread):
    arguments = batch(1, spread)
    found = LOSSES[loss](*arguments, *CLIPS[loss])
    assert float(found) == pytest.approx(by_hand(loss, *arguments, *CLIPS[loss]), rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_gradient_agrees_with_finite_differences(loss):
    new, old, advantages, sequence = batch(2, 1e-4 if loss == "gspo" else 0.3)
    bounds, fixed = CLIPS[loss], new.clone()

    def value(x):
        if loss != "cispo":
            return LOSSES[loss](x, old, advantages, sequence, *bounds)
        # Its weight is a constant by definition, so it is held while the log-probabilities move.
        weight = (fixed - old).exp().clamp(1 - bounds[0], 1 + bounds[1])
        return -(weight * advantages * x).sum()

    variable = new.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(LOSSES[loss](variable, old, advantages, sequence, *bounds), variable)
    step = 1e-7
    for i in range(len(new)):
        shift = torch.zeros_like(new)
        shift[i] = step
        numeric = (value(new + shift) - value(new - shift)) / (2 * step)
        assert float(gradient[i]) == pytest.approx(float(numeric), abs=1e-6)
    assert gradient.abs().sum() > 0.1


@pytest.mark.parametrize("loss", LOSSES)
def test_at_ratio_one_every_loss_has_the_gradient_of_reinforce(loss):
    """Before the first update the losses differ in the weight of a token only."""
    new, _, advantages, sequence = batch(3)
    new.requires_grad_()
    weights = advantages / lengths(sequence) if loss in PER_SEQUENCE else advantages
    (wanted,) = torch.autograd.grad(-(weights * new).sum(), new)
    (found,) = torch.autograd.grad(LOSSES[loss](new, new.detach(), advantages, sequence, *CLIPS[loss]), new)
    assert torch.allclose(found, wanted, rtol=1e-12)
    assert clipped(loss, new.detach(), new.detach(), advantages, sequence, *CLIPS[loss]) == 0


def test_gspo_equals_grpo_where_every_answer_is_one_token():
    new, old, advantages, _ = batch(4)
    sequence = torch.arange(len(new))
    a, b = (LOSSES[name](new, old, advantages, sequence, 0.1, 0.2) for name in ("gspo", "grpo"))
    assert torch.allclose(a, b, rtol=1e-14)
    longer = batch(4)[3]
    assert not torch.allclose(LOSSES["gspo"](new, old, advantages, longer, 0.1, 0.2), b)


def test_gspo_clips_an_answer_as_a_whole():
    sequence = torch.tensor([0, 0, 0, 1, 1])
    old = torch.zeros(5, dtype=torch.float64)
    # The first answer's mean log-ratio is 0.1, with one token that went down; the second's is 0.
    new = torch.tensor([0.5, -0.3, 0.1, 0.4, -0.4], dtype=torch.float64, requires_grad=True)
    advantages = torch.ones(5, dtype=torch.float64)
    LOSSES["gspo"](new, old, advantages, sequence, 0.05, 0.05).backward()
    assert (new.grad == 0).tolist() == [True, True, True, False, False]
    assert clipped("gspo", new.detach(), old, advantages, sequence, 0.05, 0.05) == 3
    assert torch.allclose(sequence_ratio(new.detach(), old, sequence)[3:], torch.ones(2, dtype=torch.float64))


def test_the_cispo_gradient_never_vanishes_and_its_weight_is_capped():
    old = torch.zeros(4, dtype=torch.float64)
    new = torch.tensor([3.0, -3.0, 0.1, -0.1], dtype=torch.float64, requires_grad=True)
    for signs in itertools.product((1.0, -1.0), repeat=4):
        advantages = torch.tensor(signs, dtype=torch.float64)
        (found,) = torch.autograd.grad(LOSSES["cispo"](new, old, advantages, torch.arange(4), 0.5, 0.28), new)
        weight = torch.tensor([1.28, 0.5, *new.detach()[2:].exp()], dtype=torch.float64)
        assert torch.allclose(found, -weight * advantages) and (found != 0).all()
    assert clipped("cispo", new.detach(), old, torch.ones(4), torch.arange(4), 0.5, 0.28) == 2
    (dapo,) = torch.autograd.grad(LOSSES["dapo"](new, old, torch.ones(4).double(), torch.arange(4), 0.5, 0.28), new)
    assert dapo[0] == 0, "the same token has no gradient under dapo"


def test_clip_higher_lets_improbable_tokens_grow():
    old, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    new = torch.log(torch.tensor([1.25], dtype=torch.float64)).requires_grad_()
    gradient = {}
    for loss in ("grpo", "dapo"):
        (gradient[loss],) = torch.autograd.grad(LOSSES[loss](new, old, one, torch.zeros(1).long(), *CLIPS[loss]), new)
    assert gradient["grpo"] == 0 and gradient["dapo"] == pytest.approx(-1.25)


def test_only_grpo_and_gspo_make_a_token_of_a_long_answer_weigh_less():
    new, _, _, sequence = batch(5)
    new.requires_grad_()
    for loss in LOSSES:
        (found,) = torch.autograd.grad(
            LOSSES[loss](new, new.detach(), torch.ones_like(new), sequence, *CLIPS[loss]), new
        )
        per_answer = torch.zeros(len(LENGTHS), dtype=torch.float64).index_add(0, sequence, found)
        wanted = -torch.ones(4) if loss in PER_SEQUENCE else -torch.tensor(LENGTHS)
        assert torch.allclose(per_answer, wanted.double()), loss


def test_the_denominator_of_dr_grpo_is_a_constant_and_the_others_count():
    found = {loss: denominator(loss, tokens=70.0, sequences=9.0, capacity=960.0) for loss in LOSSES}
    assert found == {"grpo": 9.0, "dr_grpo": 960.0, "dapo": 70.0, "gspo": 9.0, "cispo": 70.0}
    assert all(denominator(loss, 0.0, 0.0, 0.0) == 1.0 for loss in LOSSES), "nothing learned must not be 0 / 0"


@pytest.mark.parametrize("loss", LOSSES)
def test_sums_do_not_depend_on_how_a_batch_is_cut(loss):
    """Any grouping of whole answers into micro-batches gives the sum of all, gradients included."""
    new, old, advantages, sequence = batch(6, 1e-3 if loss == "gspo" else 0.3)
    new.requires_grad_()
    (whole,) = torch.autograd.grad(LOSSES[loss](new, old, advantages, sequence, *CLIPS[loss]), new)
    for parts in ([[0], [1], [2], [3]], [[2, 0], [3, 1]], [[1, 2, 3], [0]]):
        total = torch.zeros_like(new)
        for part in parts:
            chosen = torch.cat([torch.nonzero(sequence == s)[:, 0] for s in part])
            renumbered = torch.arange(len(part)).repeat_interleave(torch.tensor([LENGTHS[s] for s in part]))
            value = LOSSES[loss](new[chosen], old[chosen], advantages[chosen], renumbered, *CLIPS[loss])
            total += torch.autograd.grad(value, new)[0]
        assert torch.allclose(total, whole, rtol=1e-12, atol=1e-15)


def test_the_clip_stops_gradients_on_one_side_only():
    old = torch.zeros(4, dtype=torch.float64)
    log_probs = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    clipped_loss(log_probs, old, advantages, torch.arange(4), 0.2, 0.28).backward()
    # Gone too far up with a good token, or too far down with a bad one: no gradient.
    assert (log_probs.grad == 0).tolist() == [True, False, False, True]
    assert clipped("grpo", log_probs, old, advantages, torch.arange(len(old)), 0.2, 0.28) == 2


def test_k3_is_zero_for_equal_policies_and_positive_otherwise():
    a = torch.randn(100, dtype=torch.float64)
    assert torch.equal(k3(a, a), torch.zeros_like(a))
    assert (k3(a, a + torch.randn_like(a)) > 0).all()


def test_k3_averages_to_the_kl_divergence():
    torch.manual_seed(0)
    policy = torch.distributions.Categorical(logits=torch.randn(7, dtype=torch.float64))
    reference = torch.distributions.Categorical(logits=torch.randn(7, dtype=torch.float64))
    exact = torch.distributions.kl_divergence(policy, reference)
    drawn = policy.sample((200_000,))
    values = k3(policy.log_prob(drawn), reference.log_prob(drawn))
    assert abs(values.mean() - exact) < 4 * values.std() / 200_000**0.5


def test_the_gradient_of_the_kl_loss_is_the_gradient_of_the_reverse_kl():
    """With k3 alone it would be that of the forward KL; summing over all tokens makes both exact."""
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(7, dtype=torch.float64).log_softmax(0)
    exact = (logits.softmax(0) * (logits.log_softmax(0) - reference)).sum()
    (wanted,) = torch.autograd.grad(exact, logits)

    log_probs = logits.log_softmax(0)
    weight = log_probs.detach().exp()  # each token as often as the policy samples it
    ratio_k3 = (weight * (log_probs - log_probs.detach()).exp() * k3(log_probs, reference)).sum()
    (found,) = torch.autograd.grad(ratio_k3, logits, retain_graph=True)
    assert torch.allclose(found, wanted)
    (naive,) = torch.autograd.grad((weight * k3(log_probs, reference)).sum(), logits, retain_graph=True)
    assert not torch.allclose(naive, wanted, atol=1e-2)
    summed = kl_loss(log_probs, log_probs.detach(), reference)
    assert torch.allclose(summed, k3(log_probs, reference).sum())


def categoricals(seed: int):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(3)]
    return draw[0].requires_grad_(), draw[1].log_softmax(0), draw[2].log_softmax(0)


@pytest.mark.parametrize("seed", range(3))
def test_the_kl_loss_is_exact_after_the_policy_has_moved_too(seed):
    """Tokens drawn from an older policy: the ratio makes the expected gradient that of the current KL."""
    logits, old, reference = categoricals(seed)
    exact = (logits.softmax(0) * (logits.log_softmax(0) - reference)).sum()
    (wanted,) = torch.autograd.grad(exact, logits)
    terms = [kl_loss(logits.log_softmax(0)[i : i + 1], old[i : i + 1], reference[i : i + 1]) for i in range(6)]
    (found,) = torch.autograd.grad(sum(old[i].exp() * terms[i] for i in range(6)), logits)
    assert torch.allclose(found, wanted, rtol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_kl_penalty_in_the_reward_has_the_gradient_of_the_reverse_kl(seed):
    """k1 as a reward, through the policy loss; the same k1 as a loss would push nowhere."""
    logits, _, reference = categoricals(seed)
    exact = (logits.softmax(0) * (logits.log_softmax(0) - reference)).sum()
    (wanted,) = torch.autograd.grad(exact, logits)
    log_probs = logits.log_softmax(0)
    weight = log_probs.detach().exp()
    rewards = -kl_penalty(log_probs, reference)
    assert not rewards.requires_grad
    parts = [(log_probs[i : i + 1], log_probs[i : i + 1].detach(), rewards[i : i + 1]) for i in range(6)]
    losses = [LOSSES["dapo"](*part, torch.zeros(1).long(), *CLIPS["dapo"]) for part in parts]
    (found,) = torch.autograd.grad(sum(weight[i] * losses[i] for i in range(6)), logits, retain_graph=True)
    assert torch.allclose(found, wanted, rtol=1e-9)
    (as_loss,) = torch.autograd.grad((weight * (log_probs - reference)).sum(), logits)
    assert torch.allclose(as_loss, torch.zeros(6, dtype=torch.float64), atol=1e-12)


def test_the_kl_loss_is_averaged_as_the_policy_loss_is():
    new, old, _, sequence = batch(7)
    reference = old - 0.1
    per_token = (new - old).exp() * k3(new, reference)
    wanted = sum(per_token[sequence == s].mean() for s in range(len(LENGTHS)))
    assert torch.allclose(kl_loss(new, old, reference, sequence), wanted)
    assert torch.allclose(kl_loss(new, old, reference), per_token.sum())
