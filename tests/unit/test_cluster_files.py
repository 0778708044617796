"""The cluster's key on disk and its rotation; tokens."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserver.node.cluster_files import Keys, read_keys, write_keys
from nbdserver.node.errors import NodeError, WrongInputError
from nbdserver.node.invitations import MOST_TOKENS, PREFIX, Invitations, Token
from nbdserver.node.membership import steps

OLD, NEW, FRESH = b"o" * 32, b"n" * 32, b"f" * 32


@pytest.mark.parametrize("keys", [Keys(OLD), Keys(OLD, NEW, is_other_next=True), Keys(NEW, OLD)])
def test_keys_are_read_as_they_were_written_by_their_owner_only(keys: Keys, tmp_path: Path) -> None:
    write_keys(tmp_path / "cluster.key", keys)
    assert read_keys(tmp_path / "cluster.key") == keys
    assert (tmp_path / "cluster.key").stat().st_mode & 0o777 == 0o600
    assert keys.valid[0] == keys.sealing


@pytest.mark.parametrize("text", ["", "5a" * 31, "zz" * 32, "5a" * 32 + "\n" + "5a" * 32, "5a" * 32 + "\nnext\n"])
def test_what_is_no_key_is_refused_with_what_would_be_right(text: str, tmp_path: Path) -> None:
    (tmp_path / "cluster.key").write_text(text)
    with pytest.raises(WrongInputError, match=r"cluster\.key_file: .*64 hexadecimal digits"):
        read_keys(tmp_path / "cluster.key")


def test_at_every_moment_of_a_rotation_everybody_opens_what_anybody_seals() -> None:
    """Each step reaches the nodes one after the other, in any order."""
    plan = steps(Keys(OLD), FRESH)
    assert plan[-1] == Keys(FRESH)
    for before, after in itertools.pairwise([Keys(OLD), *plan]):
        assert before.sealing in after.valid
        assert after.sealing in before.valid


@pytest.mark.parametrize("done", range(4))
@pytest.mark.parametrize("reached", range(3))
def test_a_rotation_that_was_broken_off_anywhere_is_gone_on_with_from_any_node(done: int, reached: int) -> None:
    """Three nodes; `done` whole steps, the next one has reached some of them. Any node may go on."""
    first = [Keys(OLD), *steps(Keys(OLD), NEW)]
    for follower in range(3):
        nodes = [first[min(done + (node < reached), 3)] for node in range(3)]
        for step in steps(nodes[follower], FRESH):
            for node in range(3):
                nodes[node] = step
                sealed = {one.sealing for one in nodes}
                assert all(sealed <= set(one.valid) for one in nodes)
        assert len(set(nodes)) == 1
        assert nodes[0].other is None


def test_a_token_is_valid_until_its_end_and_only_its_hash_is_kept(tmp_path: Path) -> None:
    invitations = Invitations(tmp_path / "tokens.json")
    assert not invitations.has("anything", 0.0)
    secret = invitations.add(60.0, now_s=1000.0)
    other = invitations.add(5.0, now_s=1000.0)
    assert invitations.has(secret, 1059.0)
    assert not invitations.has(secret, 1061.0)
    assert not invitations.has(other, 1006.0)
    assert not invitations.has(secret[:-1], 1001.0)
    assert secret not in (tmp_path / "tokens.json").read_text()


def test_tokens_are_bounded_and_those_that_have_ended_go(tmp_path: Path) -> None:
    invitations = Invitations(tmp_path / "tokens.json")
    for _ in range(MOST_TOKENS):
        invitations.add(60.0, now_s=0.0)
    with pytest.raises(NodeError, match="64 tokens are valid already"):
        invitations.add(60.0, now_s=1.0)
    invitations.add(60.0, now_s=61.0)


def test_a_damaged_file_of_tokens_is_told(tmp_path: Path) -> None:
    (tmp_path / "tokens.json").write_text("[1")
    with pytest.raises(NodeError, match="delete it and make new tokens"):
        Invitations(tmp_path / "tokens.json").has("x", 0.0)


TOKEN = Token("prod", "10.0.0.5:10810", "ab" * 32, "secret")


def test_a_token_says_what_it_was_made_of_also_with_blanks_around_it() -> None:
    assert Token.decode(f"  {TOKEN.encode()}\n") == TOKEN


@given(
    st.one_of(st.text(), st.text().map(lambda text: PREFIX + text), st.integers(0, 150).map(TOKEN.encode().__getitem__))
)
def test_any_other_text_is_refused_clearly(text: str) -> None:
    with pytest.raises(WrongInputError, match="this is no whole token"):
        Token.decode(text)
