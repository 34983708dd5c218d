"""The nearest circular path through a trellis, by Viterbi's algorithm.

A state is L bits, and a step shifts K new ones in. Of the 2^K states before a state only their
lower L - K bits matter, and 2^K states after have them: costs are minimised once for each such
overlap, and then spread. Ends of the path must overlap too. As an approximation (QTIP, arXiv
2406.11235, section 3.3) the overlap at the seam comes from a free path through the numbers around
it, and a second path starts and ends there.

Shapes: T tiles of N numbers, S = 2^L states.
"""

from importlib.util import find_spec

import torch

__all__ = ["encode_tiles", "viterbi"]

#: steps on each side of the seam that find its overlap, times L / K
_AROUND_SEAM = 5


def encode_tiles(
    tiles: torch.Tensor, values: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the circular path of every tile that is nearest to its numbers.

    On a CPU all cores of torch's thread pool take part; on a CUDA device it is a Triton kernel,
    where states have 2 K bits or more.

    :param tiles: numbers, shape (T, N), float32
    :param values: values of the states, shape (S,), float32
    :param bits: K
    :return: the newest K bits of the states of the path, uint8, and the states' values, float32,
        shape (T, N) both
    """
    state_bits = len(values).bit_length() - 1
    around = min(-(-_AROUND_SEAM * state_bits // bits), tiles.shape[1] // 2)
    tiles, values = tiles.float().contiguous(), values.to(tiles.device)
    if tiles.device.type == "cpu":
        return _on_cpu(tiles, values, bits, around)
    if tiles.device.type == "cuda" and 2 * bits <= state_bits and find_spec("triton"):
        from casp_plugin.maths.codecs.viterbi_triton import encode  # not on every machine

        return encode(tiles, values, bits, around)
    return _by_torch(tiles, values, bits, around)


def _on_cpu(
    tiles: torch.Tensor, values: torch.Tensor, bits: int, around: int
) -> tuple[torch.Tensor, torch.Tensor]:
    import numba  # seconds, and only here

    from casp_plugin.maths.codecs.viterbi_cpu import encode

    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    symbols, nearest = encode(tiles.numpy(), values.numpy(), bits, around)
    return torch.from_numpy(symbols), torch.from_numpy(nearest)


def _by_torch(
    tiles: torch.Tensor, values: torch.Tensor, bits: int, around: int
) -> tuple[torch.Tensor, torch.Tensor]:
    seam = torch.cat([tiles[:, -around:], tiles[:, :around]], 1)
    overlap = viterbi(seam, values, bits)[:, around - 1] & (len(values) >> bits) - 1
    states = viterbi(tiles, values, bits, overlap)
    return (states & (1 << bits) - 1).to(torch.uint8), values[states]


def viterbi(
    tiles: torch.Tensor, values: torch.Tensor, bits: int, overlap: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the states of the path nearest to the numbers of every tile.

    :param tiles: numbers, shape (T, N)
    :param values: values of the states, shape (S,)
    :param bits: K
    :param overlap: lower L - K bits of the state before the first step and of the last state, shape
        (T,); None leaves both ends free
    :return: int64, shape (T, N)
    """
    count, steps = tiles.shape
    overlaps = len(values) >> bits  # G = 2^(L - K)
    rows = torch.arange(count, device=tiles.device)
    least = tiles.new_zeros(count, overlaps)  # cost up to an overlap
    if overlap is not None:
        least.fill_(torch.inf)
        least[rows, overlap] = 0
    before = torch.empty(steps, count, overlaps, dtype=torch.uint8, device=tiles.device)
    for step in range(steps):
        error = (values - tiles[:, step, None]).square_()  # (T, S)
        cost = error.unflatten(1, (overlaps, 1 << bits)).add_(least[..., None]).flatten(1)
        least, oldest = cost.unflatten(1, (1 << bits, overlaps)).min(1)
        if step + 1 < steps:
            before[step + 1] = oldest
    state = cost.argmin(1) if overlap is None else oldest[rows, overlap] * overlaps + overlap
    states = torch.empty(count, steps, dtype=torch.int64, device=tiles.device)
    for step in range(steps - 1, -1, -1):
        states[:, step] = state
        if step:
            own = state >> bits
            state = before[step, rows, own].long() * overlaps + own
    return states
