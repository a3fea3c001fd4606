"""Every method, all heads at once, against its definition for one head."""

import pytest
import torch

from tests.attention.heads import METHODS, SCALE, heads
from wildcat_kv.attention import available, reference
from wildcat_kv.attention.features import normal_matrix, orthogonal_directions
from wildcat_kv.attention.order import cells
from wildcat_kv.coreset import reference as paper
from wildcat_kv.coreset.bins import BinLayout
from wildcat_kv.coreset.draws import KeyedDraws
from wildcat_kv.coreset.noise import uniform_rows

# Each takes the method, queries of a key head (m, d) (those of its group in order), keys and values (n, ...), the
# number of key heads, and the head.


def exact(method, Q, K, V, count, head):
    return reference.softmax_attention(Q, K, V, SCALE)


def wildcat(method, Q, K, V, count, head):
    layout = method.layout(len(K))
    noise = KeyedDraws(layout, method.seed, 0, len(K), 1).gumbel(range(count), range(method.bins))[0, head]
    places = torch.cat([row[:, :size] for row, size in zip(noise, layout.used.sum(-1).tolist(), strict=True)], dim=-1)
    rank = sum(layout.rank.tolist())
    return paper.wildcat(Q, K, V, rank, places.double(), scale=SCALE, B=method.bins)


def uniform(method, Q, K, V, count, head):
    index = method.draw(count, len(K))[0, head]
    assert len(set(index.tolist())) == method.rank
    return reference.sampled_attention(Q, K, V, SCALE, index, torch.ones(len(index)))


def stratified(method, Q, K, V, count, head):
    index, weights = method.draw(count, len(K))
    for place, weight, cell in zip(
        index[0, head], weights, torch.arange(len(K)).tensor_split(method.rank), strict=True
    ):
        assert place in cell and weight == len(cell)
    return reference.sampled_attention(Q, K, V, SCALE, index[0, head], weights)


def thinformer(method, Q, K, V, count, head):
    size, rounds = 4 ** (method.g + 1), 3 - method.g
    noise = [method.noise(count, turn, 64 // size >> turn, size // 2)[head] for turn in range(rounds)]
    index = reference.thin(K, V, SCALE, method.g, noise)
    assert len(index) == method.kept(len(K)) == 2**method.g * 8
    return reference.softmax_attention(Q, K[index], V[index], SCALE)


def balancekv(method, Q, K, V, count, head):
    left, turn = torch.arange(len(K)), 0
    while len(left) > method.rank:
        blocks = left.tensor_split(min(-(-len(left) // method.block), method.rank))
        places, _, _ = cells(len(left), len(blocks))
        noise, halves = method.noise(count, turn, places)[head], []
        for block, numbers in zip(blocks, noise, strict=True):
            walk, ties = numbers.double().chunk(2)
            kept = reference.balance(K[block], V[block], SCALE, method.gamma, walk, ties[: len(block)])
            halves.append(block[kept])
        left, turn = torch.cat(halves), turn + 1
    return reference.softmax_attention(Q, K[left], V[left], SCALE)


def performer(method, Q, K, V, count, head):
    directions = orthogonal_directions(method.seed, count, method.features, K.shape[1])[head]
    return reference.performer(Q, K, V, SCALE, directions)


def scatterbrain(method, Q, K, V, count, head):
    directions = method.directions(count, K.shape[1])[head]
    groups = Q.view(-1, QUERIES, K.shape[1])
    return torch.cat([reference.scatterbrain(q, K, V, SCALE, directions, method.band) for q in groups])


def reformer(method, Q, K, V, count, head):
    chunks = -(-len(K) // method.chunk)
    buckets = (chunks + 1) // 2
    turns = range(method.seed, method.seed + method.rounds)
    rotations = [normal_matrix(turn, count, buckets, K.shape[1])[head] for turn in turns]
    return reference.reformer(Q, K, V, SCALE, rotations, method.chunk)


def hyperattention(method, Q, K, V, count, head):
    samples = method.draw(K.expand(1, count, -1, -1))
    weights = torch.full((method.samples,), len(K) / method.samples)
    normals = normal_matrix(method.seed, count, method.planes, K.shape[1])[head]
    index = samples.places[0, head]
    return reference.sorted_sampling(Q, K, V, SCALE, normals, method.block, index, weights)


def kdeformer(method, Q, K, V, count, head):
    law = reference.sampling_law(V)
    points = uniform_rows(method.seed, torch.arange(count), columns=method.samples)[head].double()
    index = torch.tensor([int((law.cumsum(0) < point).sum()) for point in points])
    normals = normal_matrix(method.seed, count, method.planes, K.shape[1])[head]
    weights = 1 / (method.samples * law[index])
    return reference.sorted_sampling(Q, K, V, SCALE, normals, method.block, index, weights)


def near_wildcat(method, Q, K, V, count, head):
    """Metric, pivots, samples and near bins of one head in plain lines."""
    plan = method.plan(len(K))
    bins = torch.arange(len(K)).tensor_split(plan.bins)
    Z = K @ reference.balanced_metric(Q, K, SCALE)[:, : method.dims]
    Z = Z - Z.mean(0)
    layout = BinLayout.build(len(K), plan.pivots, plan.bins)
    draws = KeyedDraws(layout, method.seed, 0, len(K), 1).gumbel(range(count), range(plan.bins))[0, head].double()
    offsets = uniform_rows(method.seed, torch.tensor([head]), torch.arange(plan.bins).view(-1, 1), columns=1)[..., 0, 0]
    slots = []
    for number, bin in enumerate(bins):
        H = (Z[bin] @ Z[bin].T).exp()
        S, _ = paper.rpnys(H, draws[number, :, : len(bin)])
        G = H / H.diagonal().outer(H.diagonal()).sqrt()
        left = paper.residual_diagonal(G, S).masked_fill(torch.isin(torch.arange(len(bin)), torch.tensor(S)), 0.0)
        law = left.sqrt() / left.sqrt().sum()
        points = (torch.arange(plan.samples) + offsets[number].double()) / plan.samples
        drawn = [int((law.cumsum(0) < point).sum()) for point in points]
        U, w = reference.residual_slots(H, V[bin], S, drawn, law)
        slots.append((bin[S + drawn], U, w))
    output = []
    for queries in Q.view(-1, QUERIES, K.shape[1]):
        for block in queries.tensor_split(plan.bins):
            output.append(reference.near_wildcat(block, K, V, SCALE, slots, bins, plan.near))
    return torch.cat(output)


DEFINITIONS = {
    "exact": exact,
    "wildcat": wildcat,
    "near_wildcat": near_wildcat,
    "uniform": uniform,
    "stratified": stratified,
    "thinformer": thinformer,
    "balancekv": balancekv,
    "performer": performer,
    "scatterbrain": scatterbrain,
    "reformer": reformer,
    "kdeformer": kdeformer,
    "hyperattention": hyperattention,
}
QUERIES = 40


def test_every_method_has_a_definition():
    assert list(DEFINITIONS) == list(METHODS) == [method.name for method in available()]


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("n", [70, 72])
def test_methods_match_their_definitions(name, n):
    query, key, value = heads(QUERIES, n)
    output = METHODS[name](query, key, value, scale=SCALE)
    for row in range(2):
        for head in range(2):
            Q, K, V = query[row, 2 * head : 2 * head + 2].flatten(0, 1), key[row, head], value[row, head]
            expected = DEFINITIONS[name](METHODS[name], Q, K, V, 2, head).view(2, QUERIES, -1)
            torch.testing.assert_close(output[row, 2 * head : 2 * head + 2], expected, rtol=0, atol=2e-6)
    error = (output - METHODS["exact"](query, key, value, scale=SCALE)).abs().max()
    assert error > 1e-3 or name == "exact"
