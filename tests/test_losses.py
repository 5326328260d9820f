"""Wrong signs and wrong clips do not crash; they train the wrong way. Closed forms and gradients by hand."""

import torch

from agents.grpo.losses import clip_fraction, clipped_loss, k3, kl_loss


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    log_probs = torch.randn(6, dtype=torch.float64, requires_grad=True)
    advantages = torch.randn(6, dtype=torch.float64)
    clipped_loss(log_probs, log_probs.detach(), advantages).backward()
    assert torch.allclose(log_probs.grad, -advantages)


def test_the_clip_stops_gradients_on_one_side_only():
    old = torch.zeros(4, dtype=torch.float64)
    log_probs = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    clipped_loss(log_probs, old, advantages, 0.2, 0.28).backward()
    # Gone too far up with a good token, or too far down with a bad one: no gradient.
    assert (log_probs.grad == 0).tolist() == [True, False, False, True]
    assert clip_fraction(log_probs, old, advantages, 0.2, 0.28) == 2


def test_upper_and_lower_bounds_are_separate():
    old, advantages = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    inside = torch.log(torch.tensor([1.25], dtype=torch.float64))
    assert clip_fraction(inside, old, advantages, 0.2, 0.28) == 0
    assert clip_fraction(inside, old, advantages, 0.2, 0.2) == 1


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
