"""What a load is, and what is refused as none."""

from __future__ import annotations

import itertools
import json
import random
import re
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.__main__ import app
from cluster.bench.load import (
    Arrival,
    main_traffic,
    make_load,
    parse_also,
    parse_lengths,
    prompt_of,
    read_replay,
    write_record,
)
from cluster.errors import InvalidArgument


def load(rate: float = 10.0, duration: float = 200.0, seed: int = 1, also: tuple[str, ...] = ()) -> list[Arrival]:
    others = [parse_also(text, number) for number, text in enumerate(also, 1)]
    return make_load([main_traffic(rate, "uniform:8:96", "32"), *others], duration, seed, 100_000, 2048)


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    arrivals = load(10.0, 500.0)
    gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(arrivals)]
    assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.05)
    # Exponential gaps: as spread as they are long, and 1 in e of them longer than the mean.
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.05)
    assert sum(gap > 0.1 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.02)
    assert all(0 < a.at_s < 500 for a in arrivals)


def test_the_seed_makes_the_load() -> None:
    assert load(seed=3) == load(seed=3)
    assert load(seed=3) != load(seed=4)
    arrival = Arrival(0.0, 20, 1)
    assert prompt_of(5, arrival, 3, 1000) == prompt_of(5, arrival, 3, 1000)
    assert prompt_of(5, arrival, 3, 1000) != prompt_of(6, arrival, 3, 1000)
    assert prompt_of(5, Arrival(0.0, 2, 1, prompt_ids=(8, 9)), 3, 1000) == [8, 9]


def test_another_class_is_mixed_in_by_time_and_changes_nothing_of_the_first() -> None:
    mixed = load(1.0, 20.0, also=("every:5s,prompt=fixed:2000,new=16,name=long", "rate:2,prompt=fixed:7"))
    assert [a.at_s for a in mixed] == sorted(a.at_s for a in mixed)
    long = [a for a in mixed if a.kind == "long"]
    assert [(a.at_s, a.prompt_tokens, a.new_tokens) for a in long] == [(t, 2000, 16) for t in (2.5, 7.5, 12.5, 17.5)]
    assert {a.prompt_tokens for a in mixed if a.kind == "also-2"} == {7}
    assert [a for a in mixed if a.kind == "main"] == load(1.0, 20.0)


def test_no_more_than_max_requests_arrive_however_high_the_rate() -> None:
    assert len(make_load([main_traffic(1e9, "1", "1")], 1e9, 1, 50, None)) == 50


@given(st.integers(1, 500), st.integers(0, 500), st.integers(0, 2**32))
def test_uniform_lengths_stay_inside_and_reach_both_ends(low: int, more: int, seed: int) -> None:
    rng = random.Random(seed)
    drawn = [parse_lengths("--x", f"uniform:{low}:{low + more}").draw(rng) for _ in range(30)]
    assert all(low <= value <= low + more for value in drawn)
    assert {parse_lengths("--x", "uniform:3:4").draw(rng) for _ in range(100)} == {3, 4}


def test_log_normal_lengths_have_the_median_and_are_cut_off() -> None:
    rng = random.Random(1)
    drawn = [parse_lengths("--x", "lognormal:100:1:1000").draw(rng) for _ in range(4000)]
    assert statistics.median(drawn) == pytest.approx(100, rel=0.1)
    assert max(drawn) == 1000
    assert min(drawn) >= 1
    assert sum(value < 100 / 2.718 for value in drawn) / 4000 == pytest.approx(0.159, abs=0.02)
    assert parse_lengths("--x", "lognormal:100:10:1000").draw(rng) <= 1000  # e to the power of anything


def test_what_a_log_normal_may_not_exceed_is_the_context() -> None:
    arrivals = make_load([main_traffic(10, "lognormal:50:2", "10")], 100.0, 1, 10_000, 100)
    assert max(a.prompt_tokens for a in arrivals) == 90
    with pytest.raises(InvalidArgument, match=r"--prompt-dist.*needs a MAX"):
        make_load([main_traffic(10, "lognormal:50:2", "10")], 100.0, 1, 10_000, None)
    with pytest.raises(InvalidArgument, match=r"--prompt-dist.*the 90 tokens of context left"):
        make_load([main_traffic(10, "lognormal:95:2", "10")], 100.0, 1, 10_000, 100)
    with pytest.raises(InvalidArgument, match=r"--prompt-dist.*91.*10 new tokens.*100"):
        make_load([main_traffic(10, "fixed:91", "10")], 100.0, 1, 10_000, 100)
    with pytest.raises(InvalidArgument, match=r"--also prompt.*2000"):
        load(also=("every:5s,prompt=fixed:2000,new=100",))


def test_a_recorded_load_is_the_same_when_it_is_replayed(tmp_path: Path) -> None:
    arrivals = load(2.0, 10.0, seed=9, also=("every:3s,prompt=fixed:5,name=x",))
    file = tmp_path / "load.jsonl"
    write_record(file, arrivals, 9, 300)
    again = read_replay(file, 10_000, 300, 2048)
    assert [(a.at_s, a.prompt_tokens, a.new_tokens, a.kind) for a in again] == [
        (a.at_s, a.prompt_tokens, a.new_tokens, a.kind) for a in arrivals
    ]
    other_seed = 1
    assert [prompt_of(i, a, other_seed, 300) for i, a in enumerate(again)] == [
        prompt_of(i, a, 9, 300) for i, a in enumerate(arrivals)
    ]
    write_record(tmp_path / "again", again, other_seed, 300)
    assert (tmp_path / "again").read_text() == file.read_text()


def test_a_replay_file_may_be_unsorted_and_leave_out_ids_and_class(tmp_path: Path) -> None:
    file = tmp_path / "load.jsonl"
    lines = [{"at_s": 2, "prompt_tokens": 3, "new_tokens": 4}, {"at_s": 1.5, "prompt_ids": [1, 2], "new_tokens": 1}]
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert read_replay(file, 9, 10, None) == [Arrival(1.5, 2, 1, "main", (1, 2)), Arrival(2.0, 3, 4)]
    assert len(read_replay(file, 1, 10, None)) == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nonsense", "Expecting value"),
        ("[1]", "JSON object"),
        ('{"prompt_tokens": 3, "new_tokens": 4}', "'at_s' is missing"),
        ('{"at_s": -1, "prompt_tokens": 3, "new_tokens": 4}', "at_s must be seconds from 0"),
        ('{"at_s": NaN, "prompt_tokens": 3, "new_tokens": 4}', "at_s must be seconds from 0"),
        ('{"at_s": 1, "new_tokens": 4}', "'prompt_tokens' is missing"),
        ('{"at_s": 1, "prompt_tokens": 3}', "'new_tokens' is missing"),
        ('{"at_s": 1, "prompt_tokens": 3.5, "new_tokens": 4}', "prompt_tokens must be a whole number"),
        ('{"at_s": 1, "prompt_tokens": 3, "new_tokens": 0}', "new_tokens must be a whole number from 1"),
        ('{"at_s": 1, "prompt_tokens": 9, "new_tokens": 12}', "9 and 12 tokens do not fit the context of 20"),
        ('{"at_s": 1, "prompt_ids": [], "new_tokens": 4}', "prompt_ids must be token ids from 0 to 9"),
        ('{"at_s": 1, "prompt_ids": [10], "new_tokens": 4}', "prompt_ids must be token ids from 0 to 9"),
        ('{"at_s": 1, "prompt_ids": [1], "prompt_tokens": 2, "new_tokens": 4}', "the number of prompt_ids"),
        ('{"at_s": 1, "prompt_tokens": 3, "new_tokens": 4, "class": 5}', "class must be a name"),
        ('{"at_s": 1, "prompt_tokens": 3, "new_tokens": 4, "clas": "x"}', "unknown key 'clas'"),
    ],
)
def test_a_wrong_line_of_a_replay_file_is_named(line: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "load.jsonl"
    file.write_text('{"at_s": 1, "prompt_tokens": 3, "new_tokens": 4}\n' + line + "\n")
    with pytest.raises(InvalidArgument, match=f"line 2.*{re.escape(words)}"):
        read_replay(file, 9, 10, 20)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rate", "0"], "--rate: got 0.0"),
        (["--rate", "inf"], "--rate: got inf"),
        (["--duration", "-1"], "--duration: got -1.0"),
        (["--rate", "0.001", "--duration", "0.001"], "--duration: got 0.001; no request arrives"),
        (["--max-requests", "0"], "--max-requests: got 0"),
        (["--prompt-dist", "fixed"], "--prompt-dist: got 'fixed'"),
        (["--prompt-dist", "normal:3:4"], "--prompt-dist: got 'normal:3:4'"),
        (["--prompt-dist", "fixed:0"], "--prompt-dist: got 'fixed:0'"),
        (["--prompt-dist", ""], "--prompt-dist: got ''"),
        (["--prompt-dist", "uniform:9:8"], "--prompt-dist: got 'uniform:9:8'; its largest"),
        (["--prompt-dist", "lognormal:9:0"], "--prompt-dist: got 'lognormal:9:0'; SIGMA"),
        (["--prompt-dist", "lognormal:9:nan"], "--prompt-dist: got 'lognormal:9:nan'; SIGMA"),
        (["--prompt-dist", "lognormal:9:1:8"], "--prompt-dist: got 'lognormal:9:1:8'; its largest"),
        (["--new-tokens", "x"], "--new-tokens: got 'x'"),
        (["--also", "each:5s,prompt=fixed:3"], "--also: got 'each:5s,prompt=fixed:3'"),
        (["--also", "every:0s,prompt=fixed:3"], "--also: got 'every:0s,prompt=fixed:3'"),
        (["--also", "every:5s"], "--also: got 'every:5s'; needs prompt="),
        (["--also", "every:5s,prompt=fixed:3,prompt=fixed:4"], "--also: got 'prompt=fixed:4'"),
        (["--also", "every:5s,prompt=fixed:x"], "--also prompt: got 'fixed:x'"),
        (["--also", "every:5s,prompt=1,name=main"], "--also: got 'main'; two classes"),
        (["--clients", "0"], "--clients: got 0"),
        (["--timeout", "0"], "--timeout: got 0.0"),
        (["--warmup", "-1"], "--warmup: got -1"),
        (["--replay", "/nowhere"], "--replay: got '/nowhere'; cannot be read"),
        (["--replay", "/nowhere", "--rate", "1"], "--rate: got 1.0; cannot go with --replay"),
        (["--server", "x", "--groups", "2"], "--groups: got 2; cannot go with --server"),
        (["--server", "x", "--transport", "shm"], "--transport: got 'shm'; cannot go with --server"),
        (["--protocol", "http"], "--protocol: got 'http'; must be one of grpc, openai"),
        (["--protocol", "openai", "--vocab-size", "9"], "--server: got None"),
        (["--protocol", "openai", "--server", "x:1"], "--vocab-size: got None"),
        (["--vocab-size", "9"], "--vocab-size: got 9; goes with --protocol openai"),
        (["--plot", "/nowhere/x.png"], "--plot: got '/nowhere/x.png'; there is no directory /nowhere"),
        (["--record", "/"], "--record: got '/'; cannot be written"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_starts(arguments: list[str], words: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(words)):
        app(["bench", "serve", *arguments], standalone_mode=False)
