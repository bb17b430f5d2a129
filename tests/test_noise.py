import torch

from mdm_plugin.noise import keyed_generator, keyed_uniform


def uniform(*key, places=(3,), length=10):
    return keyed_uniform(*key, places=torch.tensor(places), length=length)


def test_same_key_gives_same_numbers_whatever_was_drawn_before():
    first = uniform(1, "mask", 7)
    torch.manual_seed(0)
    torch.rand(1000)
    uniform(9, "mask", 7)
    assert torch.equal(uniform(1, "mask", 7), first)


def test_a_place_has_its_own_noise_whichever_others_are_drawn_and_however_long():
    places = [40, 2, 17, 3, 16, 2]
    whole = uniform(1, "mask", 7, places=places, length=30)
    for row, place in zip(whole, places, strict=True):
        assert torch.equal(uniform(1, "mask", 7, places=[place], length=11)[0], row[:11])
    assert torch.equal(whole[1], whole[5])
    assert len(whole[:5].unique()) == whole[:5].numel()


def test_any_change_of_the_key_gives_other_numbers():
    keys = [(1, "mask", 7), (2, "mask", 7), (1, "t", 7), (1, "mask", 8)]
    draws = [tuple(uniform(*key, places=[3, 4]).flatten().tolist()) for key in keys]
    assert len(set(sum(draws, ()))) == len(keys) * 20


def test_neighbouring_steps_places_and_positions_are_uncorrelated_and_uniform():
    u = torch.stack([uniform(0, "mask", s, places=range(40), length=32) for s in range(200)])
    limit = 4 / u.numel() ** 0.5
    assert abs(u.mean() - 0.5) < limit * (1 / 12) ** 0.5
    for axis in range(3):
        a, b = u.narrow(axis, 1, u.shape[axis] - 1), u.narrow(axis, 0, u.shape[axis] - 1)
        assert abs(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]) < limit


def test_keys_do_not_run_into_each_other():
    a = torch.rand(4, generator=keyed_generator(1, 23))
    b = torch.rand(4, generator=keyed_generator(12, 3))
    assert not torch.equal(a, b)
