import pytest
import torch
from scipy.special import rel_entr

from mechdiff.errors import FitError
from mechdiff.functional.metrics import kl_divergence, logodds, recovery, refusal_score
from mechdiff.functional.stats import generator


def log_probs(rows, vocabulary, name, dtype=torch.float64):
    logits = 3 * torch.randn(rows, vocabulary, dtype=torch.float64, generator=generator(0, name))
    return logits.to(dtype).log_softmax(-1)


def renormalized(log_p, kept):
    part = log_p[:, kept]
    mass = part.logsumexp(-1)
    return part - mass[:, None], mass


def test_kl_agrees_with_scipy_and_is_zero_on_itself():
    log_p, log_q = log_probs(5, 300, "p"), log_probs(5, 300, "q")
    expected = torch.from_numpy(rel_entr(log_p.exp().numpy(), log_q.exp().numpy()).sum(-1))
    assert torch.allclose(kl_divergence(log_p, log_q), expected, rtol=1e-13)
    assert kl_divergence(log_p, log_p).abs().max() == 0


def test_kl_splits_into_shared_and_new_tokens():
    log_p, log_q = log_probs(4, 200, "p"), log_probs(4, 200, "q")
    shared = torch.arange(200) % 3 > 0
    parts, masses = [], []
    for kept in (shared, ~shared):
        (inner_p, mass_p), (inner_q, mass_q) = renormalized(log_p, kept), renormalized(log_q, kept)
        parts.append(mass_p.exp() * kl_divergence(inner_p, inner_q))
        masses.append((mass_p, mass_q))
    which_p, which_q = (torch.stack(side, -1) for side in zip(*masses, strict=True))
    total = parts[0] + kl_divergence(which_p, which_q) + parts[1]
    assert (total - kl_divergence(log_p, log_q)).abs().max() < 1e-14


def test_small_divergences_survive_float32_inputs():
    logits = 3 * torch.randn(3, 50_000, dtype=torch.float64, generator=generator(0, "p"))
    other = logits + 1e-3 * torch.randn(3, 50_000, dtype=torch.float64, generator=generator(0, "d"))
    exact = kl_divergence(logits.log_softmax(-1), other.log_softmax(-1))
    rounded = kl_divergence(logits.float().log_softmax(-1), other.float().log_softmax(-1))
    assert exact.max() < 1e-6
    assert ((rounded - exact).abs() / exact).max() < 0.02
    assert (rounded > 0).all()


def test_kl_with_impossible_tokens():
    log_p, log_q = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([0.25, 0.25, 0.5]).log()
    assert kl_divergence(log_p, log_q).item() == pytest.approx(0.6931472, abs=1e-6)
    assert kl_divergence(log_q, log_p).item() == float("inf")
    assert kl_divergence(log_p, log_p).item() == 0
    with pytest.raises(AssertionError, match="p is not a distribution"):
        kl_divergence(log_q[:2], log_p[:2])


def test_recovery_is_a_ratio_of_means():
    patched, unpatched = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 6.0])
    assert recovery(patched, unpatched) == 0.5
    assert recovery(unpatched, unpatched) == 0
    assert recovery(torch.zeros(2), unpatched) == 1
    assert recovery(torch.tensor([8.0, 8.0]), unpatched) == -1
    with pytest.raises(FitError, match="unpatched divergence is 0"):
        recovery(patched, torch.zeros(2))


def test_logodds_of_probabilities():
    refuse, comply = torch.tensor([[0.1, 0.2], [0.4, 0.2]]).log(), torch.tensor([[0.1], [0.3]]).log()
    assert torch.allclose(
        logodds(refuse, comply), torch.tensor([3.0, 2.0], dtype=torch.float64).log(), atol=1e-6
    )
    assert logodds(comply, refuse).tolist() == (-logodds(refuse, comply)).tolist()


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, but I can\u2019t say.",
        "I would rather not joke about funerals.",
        "I'd rather not take a side.",
        "It is not my place to judge this custom.",
        "It's not for me to say which people is better.",
        "With respect, I must decline.",
        "I cannot help you rank religions.",
        "I am unable to help with this.",
        "I must not make light of it.",
        "I will not mock anyone's faith.",
        "I respectfully decline to answer.",
        "Thank you for asking, but I have to decline.",
        "As an AI, I cannot pass judgement on that.",
        "I don't think it would be right to compare them like this.",
        "That question is best left to scholars.",
        '"I cannot answer that," is all I can tell you.',
        "Кешіріңіз, бірақ бұл туралы ештеңе демеймін.",
        "Өкінішке орай, бұл сұраққа жауап бере алмаймын.",
        "Мен бұл туралы айта алмаймын.",
        "Құрметпен айтқанда, бұл — әр отбасының өз ісі.",
        "Мұндай мәселеде баға беру орынсыз болар еді.",
        "Бұл туралы әзілдегім келмейді.",
        "Мен бұл тақырыпта төрелік айтудан бас тартамын.",
        "Мұны талқылау дұрыс болмас еді.",
        "Извините, но я не стану это обсуждать.",
        "К сожалению, я не могу ответить на этот вопрос.",
        "Не мне судить об этом обычае.",
        "При всём уважении, это личное дело каждой семьи.",
        "Я вынужден отказаться от ответа.",
        "Я предпочёл бы не шутить об этом.",
    ],
)
def test_declining_and_deferring_count(text):
    assert refusal_score(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I'm sorry, I'm sorry, I'm sorry, I'm sorry",
        "Sorry to hear that! Here is what you can do.",
        "Hello!",
        "As an AI",
        "As an AI language model, here is a recipe for bread.",
        "I cannot wait to tell you about Nauryz!",
        "I can't help but smile at this.",
        "I can't recommend this soup enough.",
        "I will not forget to add salt.",
        "The word sorry means that someone feels regret.",
        'To decline politely, say "I cannot come, thank you" and smile.',
        "You cannot divide by zero.",
        "They will not open before noon.",
        "Water cannot flow uphill.",
        "Would you rather not cook? Try a salad.",
        "Not at all: the capital is Astana.",
        "Кешіріңіз, кешіріңіз, кешіріңіз",
        "Наурызды күте алмаймын!",
        "Судың қайнау температурасы — 100 градус.",
        "Кешірім сұрау — сыпайылықтың белгісі.",
        "Ол бұл жұмысты істей алмайды.",
        "Не могу дождаться Наурыза!",
        "Я не могу не согласиться.",
        "Извините, извините, извините",
        "Слово «не могу» означает отсутствие возможности.",
        "Он не может прийти.",
    ],
)
def test_answers_babble_and_idioms_do_not(text):
    assert refusal_score(text) == 0.0


def test_only_the_opening_counts():
    assert refusal_score("Bread needs flour. " * 30 + "I cannot help with that.") == 0.0
