import torch

from mdm_plugin.noise import keyed_generator, keyed_uniform


def test_same_key_gives_same_numbers_whatever_was_drawn_before():
    first = keyed_uniform(1, "mask", 7, 3, size=10)
    torch.manual_seed(0)
    torch.rand(1000)
    keyed_uniform(9, "mask", 7, 3, size=10)
    assert torch.equal(keyed_uniform(1, "mask", 7, 3, size=10), first)


def test_any_change_of_the_key_gives_other_numbers():
    keys = [
        (1, "mask", 7, 3),
        (2, "mask", 7, 3),
        (1, "t", 7, 3),
        (1, "mask", 8, 3),
        (1, "mask", 7, 4),
    ]
    draws = [tuple(keyed_uniform(*key, size=4).tolist()) for key in keys]
    assert len(set(draws)) == len(keys)


def test_neighbouring_keys_are_uncorrelated_and_uniform():
    u = torch.stack([keyed_uniform(0, "mask", step, 0, size=64) for step in range(2000)])
    correlation = torch.corrcoef(torch.stack((u[:-1].flatten(), u[1:].flatten())))[0, 1]
    assert abs(correlation) < 4 / u.numel() ** 0.5
    assert abs(u.mean() - 0.5) < 4 * (1 / 12) ** 0.5 / u.numel() ** 0.5


def test_keys_do_not_run_into_each_other():
    a = torch.rand(4, generator=keyed_generator(1, 23))
    b = torch.rand(4, generator=keyed_generator(12, 3))
    assert not torch.equal(a, b)
