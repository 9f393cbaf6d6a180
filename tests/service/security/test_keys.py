"""Key files: who is in them, how a key gets there, and what is no key file."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from service.security.keys import Key, KeyFileError, Keyring, add_key, read_keys
from tests.service.commands import run_all

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
LONG = st.binary(min_size=32, max_size=256)


def key(name, presented):
    return Key(name=name, sha256=sha256(presented).hexdigest())


@settings(deadline=None)
@given(st.lists(LONG, unique=True, max_size=8), st.binary(max_size=300), st.data())
def test_a_key_belongs_to_whoever_has_it_and_to_nobody_else(secrets, other, data):
    keyring = Keyring([key(f"k{n}", secret) for n, secret in enumerate(secrets)])
    for number, secret in enumerate(secrets):
        assert keyring.name(secret) == f"k{number}"
        position = data.draw(st.integers(0, len(secret) - 1))
        changed = bytearray(secret)
        changed[position] ^= data.draw(st.integers(1, 255))
        if bytes(changed) not in secrets:
            assert keyring.name(bytes(changed)) is None
    if other not in secrets:
        assert keyring.name(other) is None


def test_what_somebody_thought_up_is_no_key():
    for secret in (b"", b"secret", b"x" * 31, b"x" * 257):
        assert Keyring([key("weak", secret)]).name(secret) is None


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(NAMES, st.none() | st.floats(0.001, 1e9), st.none() | st.integers(1, 10**6)),
        unique_by=lambda asked: asked[0].lower(),
        max_size=5,
    ),
    st.sampled_from(["", "# ours\n", "# no end of line", "\n\n"]),
)
def test_keys_that_are_made_are_in_the_file_and_only_their_hashes(tmp_path_factory, asked, before):
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.write_text(before)
    made = {}
    for name, rate, burst in asked:
        limits = (rate, burst if rate is not None else None)
        made[name] = add_key(path, name, *limits), limits
    keys = read_keys(path)
    assert [key.name for key in keys] == list(made)
    keyring, written = Keyring(keys), path.read_text()
    for one in keys:
        secret, limits = made[one.name]
        assert keyring.name(secret.encode()) == one.name
        assert (one.images_per_s, one.burst) == limits
        assert secret not in written
    assert written.startswith(before)


def test_keys_differ_and_their_file_is_for_its_owner(tmp_path):
    path = tmp_path / "keys.toml"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: add_key(path, f"k{n}"), range(40)))
    assert len(set(made)) == len(read_keys(path)) == 40
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    with pytest.raises(KeyFileError, match="there is a key 'K7' already"):
        add_key(path, "K7")
    for name in ("", "_none", "a b", "a\n", 'a"', "x" * 101):
        with pytest.raises(ValidationError):
            add_key(path, name)
    assert len(read_keys(path)) == 40


GOOD = f'[[key]]\nname = "a"\nsha256 = "{"0" * 64}"\n'


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"[[key]", "line 1"),
        (b"a = " + b"[" * 5000, "recursion"),
        (b"\xff\xfe[\0[\0", "UTF-16"),
        (b"\x80", "not in UTF-8"),
        (b"[[keys]]\n", "keys: there is no such field; did you mean key?"),
        (b'[[key]]\nname = "a"\n', "key.0.sha256: Field required"),
        (GOOD.encode() + b"x = 1\n", "key.0.x: there is no such field"),
        (b'[[key]]\nname = "a"\nsha256 = "THE-SECRET"\n', "key.0.sha256: String should match"),
        (GOOD.encode() + b"burst = 2\n", "key.0: burst needs images_per_s"),
        (GOOD.encode() + b"images_per_s = -1.0\n", "greater than 0"),
        (GOOD.encode() + b"images_per_s = inf\n", "finite"),
        (2 * GOOD.encode(), "two keys have the name of 'a'"),
        (GOOD.encode() + GOOD.encode().replace(b'"a"', b'"b"'), "have the sha256 of 'a'"),
    ],
)
def test_what_is_no_key_file_is_said_to_be_none_without_showing_it(tmp_path, text, word):
    path = tmp_path / "keys.toml"
    path.write_bytes(text)
    with pytest.raises(KeyFileError, match=word) as refused:
        read_keys(path)
    assert str(path) in str(refused.value)
    assert "SECRET" not in str(refused.value)
    with pytest.raises(KeyFileError):
        add_key(path, "new")
    assert path.read_bytes() == text


def test_the_command_prints_the_key_alone(tmp_path):
    path, nowhere = tmp_path / "keys.toml", tmp_path / "none" / "keys.toml"
    asked = [
        (("key", "mobile", "--images-per-s", 5, "--burst", 9), {"DAT_SECURITY__API_KEYS": path}),
        (("key", "a", "--burst", 9, "--file", nowhere), {}),
        (("key", "a b", "--file", nowhere), {}),
        (("key", "a", "--file", nowhere), {}),
        (("key", "a"), {}),
    ]
    made, *refused = run_all(asked)
    assert (made.returncode, made.stderr) == (0, "")
    (known,) = read_keys(path)
    assert (known.name, known.images_per_s, known.burst) == ("mobile", 5, 9)
    assert Keyring([known]).name(made.stdout.removesuffix("\n").encode()) == "mobile"
    words = ("burst needs images_per_s", "NAME: String", "No such file", "DAT_SECURITY__API_KEYS")
    for ended, word in zip(refused, words, strict=True):
        (line,) = ended.stderr.splitlines()
        assert (ended.returncode, ended.stdout) == (1, "")
        assert word in line
