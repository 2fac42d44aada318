"""Documents packed into full rows: none sees another, none is cut that fits."""

from __future__ import annotations

from bisect import bisect_left, insort

from graft.data.records import TokenRow


def pack_documents(rows: list[TokenRow], max_length: int) -> list[TokenRow]:
    """Puts documents together into rows of at most `max_length` tokens.

    Each document is a branch of its row, so it attends to itself alone and counts its positions
    from 0. One that is longer is cut first; a piece begins with the last token of the one before,
    so that every token but the document's first is a target once.

    Reference:
        Fewer Truncations Improve Language Modeling, arXiv 2404.10830 (best-fit-decreasing).
    """
    pieces = [piece for row in rows for piece in _cut(row, max_length)]
    groups = _best_fit([len(piece.input_ids) for piece in pieces], max_length)
    return [_join([pieces[at] for at in group]) for group in groups]


def _cut(row: TokenRow, max_length: int) -> list[TokenRow]:
    pieces = []
    for start in range(0, len(row.input_ids) - 1, max_length - 1):
        end = start + max_length
        is_supervised = [False, *row.is_supervised[start + 1 : end]]
        pieces.append(TokenRow(row.input_ids[start:end], is_supervised, row.source))
    return pieces


def _best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Groups items, the longest first, each into the group with the least room that takes it."""
    groups: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # room left and group, ascending
    for item in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        found = bisect_left(rooms, (lengths[item], 0))
        if found == len(rooms):
            room, group = capacity, len(groups)
            groups.append([])
        else:
            room, group = rooms.pop(found)
        groups[group].append(item)
        insort(rooms, (room - lengths[item], group))
    return sorted(sorted(group) for group in groups)


def _join(pieces: list[TokenRow]) -> TokenRow:
    if len(pieces) == 1:
        return pieces[0]
    others = len(pieces) - 1
    return TokenRow(
        input_ids=[token for piece in pieces for token in piece.input_ids],
        is_supervised=[target for piece in pieces for target in piece.is_supervised],
        source=f"{pieces[0].source} and {others} more",
        branch=[number for number, piece in enumerate(pieces, 1) for _ in piece.input_ids],
    )
