"""What models write, alone and together, against beams that are searched by hand, and `decode`, which keeps it."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from tiny_translation import SIZE, llama, make_tokenizer, marian, pairs, write_rows
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from kdfast.models.ensemble import Ensemble, mean_logits
from kdfast.models.generate import Decoding, write
from kdfast.models.settings import end_ids
from kdfast.models.view import look
from kdfast.text import TextData
from kdfast.text.documents import Corpus
from kdfast.text.tokenizers import load_tokenizer
from kdfast.train.batch import Batch
from kdfast.train.decode import asked_in, decode
from kdfast.train.documents import Documents
from kdfast.train.teachers import LiveTeacher

SOURCES = [[3, 4, 5, 6], [7, 1], [2, 9, 11]]


def padded(rows: list[list[int]], left: bool = False) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    fill = [[0] * (longest - len(row)) for row in rows]
    ids = [f + row if left else row + f for f, row in zip(fill, rows, strict=True)]
    mask = [[0] * len(f) + [1] * len(row) if left else [1] * len(row) + [0] * len(f)
            for f, row in zip(fill, rows, strict=True)]  # fmt: skip
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@torch.no_grad()
def next_logs(models: list[nn.Module], weights: list[float], source: list[int], said: tuple[int, ...]) -> Tensor:
    """log of the members' mean probability of each next id, without any cache, in float64."""
    probabilities = torch.zeros(SIZE, dtype=torch.float64)
    for model, weight in zip(models, weights, strict=True):
        if model.config.is_encoder_decoder:
            inputs = {"input_ids": torch.tensor([source]), "decoder_input_ids": torch.tensor([[0, *said]])}
        else:
            inputs = {"input_ids": torch.tensor([[*source, *said]])}
        probabilities += weight * model(**inputs).logits[0, -1].double().softmax(-1)
    return probabilities.log()


def beam_by_hand(models: list[nn.Module], weights: list[float], source: list[int], beams: int, most: int) -> list[Any]:
    """The textbook search, no penalty of length: [(ids, log P)], best first."""
    running: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    finished = []
    for step in range(most):
        grown = [((*said, i), score + float(log)) for said, score in running
                 for i, log in enumerate(next_logs(models, weights, source, said))]  # fmt: skip
        grown.sort(key=lambda x: -x[1])
        grown = grown[: 2 * beams]
        done = [g for g in grown[:beams] if g[0][-1] == 0 or step == most - 1]
        finished += done
        running = [g for g in grown if g[0][-1] != 0][:beams]
    return sorted(finished, key=lambda x: -x[1])[:beams]


MEMBERS = {
    "one encoder-decoder": lambda: [marian(0)],
    "three encoder-decoders of two widths": lambda: [marian(0), marian(1, width=24), marian(2, decoder_layers=2)],
    "one causal": lambda: [llama(3)],
    "two causal": lambda: [llama(3), llama(4, num_hidden_layers=1)],
}


@pytest.mark.parametrize("beams", [1, 3, 6])
@pytest.mark.parametrize("name", MEMBERS)
def test_a_beam_is_the_textbook_search_over_mean_probabilities(name: str, beams: int) -> None:
    models = MEMBERS[name]()
    weights = [1.0] if len(models) == 1 else [0.5, 0.3, 0.2] if len(models) == 3 else [0.7, 0.3]
    model = models[0] if len(models) == 1 else Ensemble(models, [10 * w for w in weights]).eval()
    causal = not models[0].config.is_encoder_decoder
    before = models[0].generation_config
    found = write(model, padded(SOURCES, left=causal), Decoding(beams, beams, 5, length_penalty=0.0), [0])
    assert models[0].generation_config is before
    for source, group in zip(SOURCES, found, strict=True):
        want = beam_by_hand(models, weights, source, beams, 5)
        if beams == 1:  # greedy takes the likeliest next id and never looks back
            greedy: tuple[int, ...] = ()
            while len(greedy) < 5 and 0 not in greedy:
                greedy = (*greedy, int(next_logs(models, weights, source, greedy).argmax()))
            want = [(greedy, sum(float(next_logs(models, weights, source, greedy[:i])[x]) for i, x in enumerate(greedy)))]
        assert [tuple(h.ids.tolist()) for h in group] == [ids for ids, _ in want]
        assert [h.score for h in group] == pytest.approx([score for _, score in want], abs=1e-4)


def test_the_members_own_settings_say_nothing_about_how() -> None:
    model = marian(0)
    want = [h.ids.tolist() for (h,) in write(model, padded(SOURCES), Decoding(3, 1, 6), [0])]
    model.generation_config.update(num_beams=1, do_sample=True, max_length=3, forced_eos_token_id=5, repetition_penalty=9.0)
    assert [h.ids.tolist() for (h,) in write(model, padded(SOURCES), Decoding(3, 1, 6), [0])] == want
    model.generation_config.suppress_tokens = [want[0][0]]  # but what may be written at all stays
    assert all(want[0][0] not in h.ids.tolist() for (h,) in write(model, padded(SOURCES), Decoding(3, 1, 6), [0]))
    together = Ensemble([model, marian(1)]).eval()
    assert all(want[0][0] not in h.ids.tolist() for (h,) in write(together, padded(SOURCES), Decoding(3, 1, 6), [0]))


HOW = {
    "min_new_tokens": 6, "encoder_no_repeat_ngram_size": 1, "exponential_decay_length_penalty": (1, 5.0), "guidance_scale": 3.0,
    "sequence_bias": [[[5], 9.0]], "prompt_lookup_num_tokens": 3, "renormalize_logits": True, "top_h": 0.3, "min_p": 0.4,
    "stop_strings": ["ein"], "low_memory": True, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "max_time": 1e-9,
    "remove_invalid_values": True, "length_penalty": 5.0, "early_stopping": "never", "token_healing": True,
}  # fmt: skip


@pytest.mark.parametrize("decoding", [Decoding(3, 1, 6), Decoding(1, 1, 6), Decoding(count=3, max_tokens=6, sample=True)])
@pytest.mark.parametrize("make", [marian, llama])
def test_no_setting_of_a_model_says_how(make: Any, decoding: Decoding) -> None:
    def said() -> list[list[list[int]]]:
        torch.manual_seed(0)
        return [[h.ids.tolist() for h in group] for group in write(model, padded(SOURCES, make is llama), decoding, [0])]

    model = make(3)
    want = said()
    for name, value in HOW.items():
        setattr(model.generation_config, name, value)
        assert said() == want, name
        setattr(model.generation_config, name, None)


def beam_with_bans(models: list[nn.Module], weights: list[float], source: list[int], beams: int, most: int, bans: Any) -> Any:
    """`beam_by_hand` where `bans(said)` names what may not come next; what may keeps its probability."""
    running: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    finished = []
    for step in range(most):
        grown = [((*said, i), score + float(log)) for said, score in running
                 for i, log in enumerate(next_logs(models, weights, source, said)) if i not in bans(said)]  # fmt: skip
        grown.sort(key=lambda x: -x[1])
        grown = grown[: 2 * beams]
        finished += [g for g in grown[:beams] if g[0][-1] == 0 or step == most - 1]
        running = [g for g in grown if g[0][-1] != 0][:beams]
    return sorted(finished, key=lambda x: -x[1])[:beams]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("make", [marian, llama])
def test_what_one_may_not_write_is_taken_out_of_the_mean(make: Any, order: int) -> None:
    """Of the lead or another one: ids keep their mean probability, in the search as in the score."""
    models, weights = [make(3), make(4)], [0.7, 0.3]
    likely = [int(next_logs(models, weights, source, ()).argmax()) for source in SOURCES]
    models[0].generation_config.suppress_tokens = [likely[0]]
    models[0].generation_config.begin_suppress_tokens = [likely[1], 5]
    models[0].generation_config.bad_words_ids = [[4, 7], [11]]

    def bans(said: tuple[int, ...]) -> set[int]:
        return {likely[0], 11, *((likely[1], 5) if not said else ()), *((7,) if said[-1:] == (4,) else ())}

    model = Ensemble(models[::order], weights[::order]).eval()
    for beams in (1, 4):
        found = write(model, padded(SOURCES, make is llama), Decoding(beams, beams, 4, length_penalty=0.0), [0])
        for source, group in zip(SOURCES, found, strict=True):
            want = beam_with_bans(models, weights, source, beams, 4, bans)
            if beams == 1:  # greedy never looks back
                greedy: tuple[int, ...] = ()
                while len(greedy) < 4 and 0 not in greedy:
                    logs = next_logs(models, weights, source, greedy)
                    logs[list(bans(greedy))] = -torch.inf
                    greedy = (*greedy, int(logs.argmax()))
                want = [(greedy, sum(float(next_logs(models, weights, source, greedy[:i])[x]) for i, x in enumerate(greedy)))]
            assert [tuple(h.ids.tolist()) for h in group] == [ids for ids, _ in want]
            assert [h.score for h in group] == pytest.approx([score for _, score in want], abs=1e-4)


def test_a_forced_id_is_no_choice() -> None:
    models = [marian(0), marian(1)]
    models[1].generation_config.forced_bos_token_id = 5
    for (h, *_), source in zip(write(Ensemble(models).eval(), padded(SOURCES), Decoding(3, 3, 4), [0]), SOURCES, strict=True):
        said = tuple(h.ids.tolist())
        want = sum(float(next_logs(models, [0.5, 0.5], source, said[:i])[said[i]]) for i in range(1, len(said)))
        assert (said[0], h.score) == (5, pytest.approx(want, abs=1e-4))
    (group,) = write(models[1], padded(SOURCES[:1]), Decoding(4, 4, 1), [0])
    assert [(h.ids.tolist(), h.score) for h in group] == [([5], 0.0)]


def test_a_beam_wider_than_what_can_be_written_holds_each_text_once() -> None:
    for models in ([llama(3)], [llama(3), llama(4)]):
        model = models[0] if len(models) == 1 else Ensemble(models).eval()
        for source, group in zip(SOURCES, write(model, padded(SOURCES, True), Decoding(20, 20, 1), [0]), strict=True):
            logs, ids = next_logs(models, [1 / len(models)] * len(models), source, ()).sort(descending=True)
            assert [h.ids.tolist() for h in group] == [[i] for i in ids.tolist()]
            assert [h.score for h in group] == pytest.approx(logs.tolist(), abs=1e-4)


def gpt2(seed: int, positions: int) -> nn.Module:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=positions, initializer_range=0.5,
                        eos_token_id=0, bos_token_id=None)  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("most", [None, 12])
@pytest.mark.parametrize("name", ["rotated", "positions in a table", "both"])
def test_a_row_is_written_as_if_it_was_alone(name: str, most: int | None, count: int) -> None:
    """Whatever prompts it shares a batch with, each has room to its own end, and one that fills the positions has none."""
    made = {"rotated": [llama(3, max_position_embeddings=14)], "positions in a table": [gpt2(0, 14)],
            "both": [gpt2(1, 14), llama(4, max_position_embeddings=20)]}[name]  # fmt: skip
    model = made[0] if len(made) == 1 else Ensemble(made).eval()
    generator = torch.Generator().manual_seed(0)
    lengths = [2, 14, 11, 5, 13, 1, 7, 12, 15, 11]
    prompts = [torch.randint(1, SIZE, (n,), generator=generator).tolist() for n in lengths]
    decoding = Decoding(count, count, 9, length_penalty=1.0)
    together = write(model, padded(prompts, True), decoding, [0], most=most)
    ended = []
    for prompt, group in zip(prompts, together, strict=True):
        room = min(9, (most or 14) - len(prompt))
        (alone,) = write(model, padded([prompt], True), decoding, [0], most=most)
        assert [h.ids.tolist() for h in group] == [h.ids.tolist() for h in alone]
        assert [h.score for h in group] == pytest.approx([h.score for h in alone], abs=1e-4)
        assert bool(group) == (room > 0)
        assert all(len(h.ids) == room or (len(h.ids) < room and int(h.ids[-1]) == 0) for h in group)
        ended += [len(h.ids) == room for h in group]
        if count == 4 and room > 0:
            ids = torch.tensor([prompt])
            plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, num_beams=4, pad_token_id=0,
                                   num_return_sequences=4, early_stopping=False) if len(made) == 1 else []  # fmt: skip
            for said, h in zip(plain, group, strict=False):
                assert said[len(prompt) : len(prompt) + len(h.ids)].tolist() == h.ids.tolist()
    assert any(ended)


def test_samples_have_each_row_its_own_room() -> None:
    prompts = [[3, 4], [5] * 8, [7, 1, 2, 9, 11]]
    groups = write(gpt2(0, 10), padded(prompts, True), Decoding(count=50, max_tokens=6, sample=True), [0])
    for prompt, group in zip(prompts, groups, strict=True):
        room = min(6, 10 - len(prompt))
        assert max(len(h.ids) for h in group) == room
        assert all(len(h.ids) == room or int(h.ids[-1]) == 0 for h in group)


@torch.no_grad()
@pytest.mark.parametrize("ensemble", [False, True])
def test_a_decoder_starts_from_its_own_start(ensemble: bool) -> None:
    """Of its bos token where nothing else is known, as in `generate`; in an ensemble each member from its own."""
    fields = {"vocab_size": SIZE, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**fields, eos_token_id=0, bos_token_id=7, decoder_start_token_id=None)).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    assert (model.generation_config.decoder_start_token_id, model.generation_config.bos_token_id) == (None, 7)
    other = marian(0)
    for source, (h,) in zip(SOURCES, write(Ensemble([other, model]).eval() if ensemble else model, padded(SOURCES),
                                           Decoding(1, 1, 5), [0]), strict=True):  # fmt: skip
        said: list[int] = []
        score = 0.0
        while len(said) < 5 and 0 not in said:
            own = model(input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([[7, *said]])).logits[0, -1]
            mean = own.double().softmax(-1)
            if ensemble:
                mean = (mean + next_logs([other], [1.0], source, tuple(said)).exp()) / 2
            said.append(int(mean.argmax()))
            score += float(mean.max().log())
        assert (h.ids.tolist(), h.score) == (said, pytest.approx(score, abs=1e-4))


def test_an_ensemble_ends_where_one_member_would() -> None:
    models = [llama(3), llama(4)]
    models[1].generation_config.eos_token_id = [0, 9]
    assert end_ids(Ensemble(models)) == end_ids(Ensemble(models[::-1])) == [0, 9]
    assert end_ids(models[0], 4) == [0]


def test_samples_follow_the_mean_probabilities() -> None:
    models = [llama(3), llama(4)]
    torch.manual_seed(0)
    groups = write(Ensemble(models).eval(), padded([[3, 4]] * 4, True), Decoding(count=500, max_tokens=1, sample=True), [0])
    drawn = torch.bincount(torch.tensor([int(h.ids[0]) for group in groups for h in group]), minlength=SIZE) / 2000
    want = next_logs(models, [0.5, 0.5], [3, 4], ()).exp()
    assert float((drawn - want).abs().max()) < 0.05
    assert all(a.score >= b.score for group in groups for a, b in itertools.pairwise(group))


def test_an_ensemble_is_the_mean_of_probabilities() -> None:
    z = [torch.randn(2, 3, 7, dtype=torch.float64).float() for _ in range(3)]
    want = (0.5 * z[0].double().softmax(-1) + 0.25 * z[1].double().softmax(-1) + 0.25 * z[2].double().softmax(-1)).log()
    assert torch.allclose(mean_logits(z, [0.5, 0.25, 0.25]).double(), want, atol=1e-6)
    with pytest.raises(ValueError, match="members: expected at least one model"):
        Ensemble([])


@pytest.mark.parametrize("order", [1, -1])
def test_members_of_an_ensemble_each_get_what_they_take(order: int) -> None:
    """BERT has types of tokens and DistilBERT none, whichever is the first."""
    sizes = {"vocab_size": SIZE, "num_labels": 2, "pad_token_id": 0, "max_position_embeddings": 8, "initializer_range": 0.5}
    bert = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **sizes)
    distilled = DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=32, **sizes)
    models = [BertForSequenceClassification(bert).eval(), DistilBertForSequenceClassification(distilled).eval()]
    ids, types = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[0, 0, 1, 1]])
    with torch.no_grad():
        got = look(Ensemble(models[::order]).eval(), {"input_ids": ids, "token_type_ids": types}).logits
        logits = [models[0](input_ids=ids, token_type_ids=types).logits, models[1](input_ids=ids).logits]
    want = torch.stack([z.double().softmax(-1) for z in logits]).mean(0).log()
    assert torch.allclose(got.double(), want, atol=1e-6)


def test_what_cannot_write_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model: expected a transformers model, which can write text, got Linear"):
        write(nn.Linear(2, 2), padded(SOURCES), Decoding(), [0])
    with pytest.raises(ValueError, match="model: expected an ensemble of causal models or one of encoder-decoders, got both"):
        write(Ensemble([llama(3), marian(0)]), padded(SOURCES), Decoding(), [0])


# The stage


@pytest.fixture
def rows(tmp_path: Path) -> tuple[Any, Documents]:
    file = make_tokenizer(tmp_path / "tokenizer")
    data = write_rows(tmp_path / "pairs.jsonl", pairs(23))
    tokenizer = load_tokenizer(file)[0]
    corpus = Corpus(TextData(paths=(str(data),), sequence_length=16), tokenizer, file.parent, task="seq2seq")
    return tokenizer, Documents.of(corpus, tmp_path / "rows")


@contextmanager
def stopping_bar(after: int) -> Iterator[Any]:
    class Shown:
        def update(self, done: int, note: str = "") -> None:
            if done >= after:
                os.kill(os.getpid(), signal.SIGINT)

    yield Shown()


@pytest.mark.parametrize("sample", [False, True])
def test_a_decoding_that_is_stopped_and_killed_ends_in_the_same_bytes(
    sample: bool, rows: tuple[Any, Documents], tmp_path: Path
) -> None:
    tokenizer, documents = rows
    teachers = [LiveTeacher(marian(0)), LiveTeacher(marian(1), weight=2.0)]
    decoding = Decoding(3, 3, 6, sample=sample)
    options: dict[str, Any] = {"tokenizer": tokenizer, "identity": ["a", "b"], "batch_size": 5}
    said: list[str] = []
    whole = decode(teachers, documents, decoding, tmp_path / "whole", say=said.append, **options)
    assert said[-1].startswith("decoded 23 sources")
    with pytest.raises(KeyboardInterrupt, match="stopped after 10 of 23 sources"):
        decode(teachers, documents, decoding, tmp_path / "cut", say=said.append, bar=lambda *_: stopping_bar(10), **options)
    part = tmp_path / "cut" / "hypotheses.part.jsonl"
    lines = part.read_text().splitlines(keepends=True)
    # Killed amid a batch: some of its lines are there, and half of one.
    part.write_text("".join(lines) + lines[0] + lines[1][:20])
    again = decode(teachers, documents, decoding, tmp_path / "cut", say=said.append, **options)
    assert said[-2].endswith("going on after 2 of 5 batches")
    assert again.read_bytes() == whole.read_bytes()
    assert not part.exists()
    assert decode(teachers, documents, decoding, tmp_path / "cut", say=said.append, **options) == again
    assert said[-1].endswith("decoded before")
    read = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [(line["row"], line["rank"]) for line in read] == [(i, j) for i in range(23) for j in range(3)]
    assert [line["source"] for line in read[::3]] == [pair["source"] for pair in pairs(23)]
    assert all(line["target"] == tokenizer.decode(line["ids"]) for line in read)


def test_a_signal_in_the_last_batch_stops_when_all_is_written(rows: tuple[Any, Documents], tmp_path: Path) -> None:
    tokenizer, documents = rows
    options: dict[str, Any] = {"tokenizer": tokenizer, "identity": ["a"], "say": lambda line: None}
    teachers, decoding = [LiveTeacher(marian(0))], Decoding(2, 2, 4)
    whole = decode(teachers, documents, decoding, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt, match="stopped after 23 of 23 sources; run the same again to go on"):
        decode(teachers, documents, decoding, tmp_path / "cut", bar=lambda *_: stopping_bar(23), **options)
    assert sorted(file.name for file in (tmp_path / "cut").glob("*.json*")) == ["decoding.json", "hypotheses.jsonl"]
    said: list[str] = []
    again = decode(teachers, documents, decoding, tmp_path / "cut", **{**options, "say": said.append})
    assert said == [f"{again}: decoded before"]
    assert again.read_bytes() == whole.read_bytes()


def test_a_folder_of_the_same_weights_in_another_way_is_refused(rows: tuple[Any, Documents], tmp_path: Path) -> None:
    tokenizer, documents = rows
    folder = tmp_path / "d"
    options: dict[str, Any] = {"tokenizer": tokenizer, "identity": ["a"], "say": lambda line: None}
    decode([LiveTeacher(marian(0))], documents, Decoding(2, 2, 4), folder, **options)

    def refused(model: nn.Module, named: str) -> None:
        with pytest.raises(ValueError, match=rf"method\.decoded: .* holds what was decoded with other {named}; name another"):
            decode([LiveTeacher(model)], documents, Decoding(2, 2, 4), folder, **options)

    refused(marian(0).bfloat16(), "dtypes")
    for name, value in (("suppress_tokens", [4, 9]), ("eos_token_id", [0, 3]), ("forced_bos_token_id", 5)):
        model = marian(0)
        setattr(model.generation_config, name, value)
        refused(model, "generation_config")
    model.generation_config = marian(0).generation_config
    model.generation_config.update(num_beams=7, max_length=3, repetition_penalty=2.0)  # says nothing here
    decode([LiveTeacher(model)], documents, Decoding(2, 2, 4), folder, **options)
    # A folder of a version that did not keep these is taken as it is.
    about = json.loads((folder / "decoding.json").read_text())
    for name in ("dtypes", "generation_config"):
        del about["of"][name]
    (folder / "decoding.json").write_text(json.dumps(about))
    decode([LiveTeacher(marian(0).bfloat16())], documents, Decoding(2, 2, 4), folder, **options)


def test_a_folder_of_another_decoding_is_refused(rows: tuple[Any, Documents], tmp_path: Path) -> None:
    tokenizer, documents = rows
    options: dict[str, Any] = {"tokenizer": tokenizer, "say": lambda line: None}
    decode([LiveTeacher(marian(0))], documents, Decoding(2, 2, 4), tmp_path / "d", identity=["a"], **options)
    for identity, decoding, named in ((["b"], Decoding(2, 2, 4), "teachers"), (["a"], Decoding(3, 3, 4), "beams, count")):
        with pytest.raises(ValueError, match=rf"method\.decoded: .* holds what was decoded with other {named}"):
            decode([LiveTeacher(marian(0))], documents, decoding, tmp_path / "d", identity=identity, **options)


def test_what_a_row_asks(rows: tuple[Any, Documents]) -> None:
    _, documents = rows
    asked = asked_in(documents, 3)
    assert (asked.source.tolist(), asked.start) == (documents.batch([3]).input_ids[0].tolist(), 0)
    assert asked.gold.tolist() == documents.batch([3]).labels[0].tolist()


@pytest.mark.parametrize("left", [False, True])
def test_padding_of_a_row_is_no_part_of_its_prompt(left: bool) -> None:
    class Rows:
        def batch(self, indices: Any) -> Batch:
            ids, labels = [3, 4, 5, 8, 9], [-100, -100, 8, 9, -100]
            before, after = ([0, 0], []) if left else ([], [0, 0])
            mask = [0] * len(before) + [1] * 5 + [0] * len(after)
            none = [[-100] * len(part) for part in (before, after)]
            return Batch(*(torch.tensor([row]) for row in (before + ids + after, none[0] + labels + none[1], mask)))

    asked = asked_in(Rows(), 0)  # type: ignore[arg-type]
    assert (asked.source.tolist(), asked.gold.tolist(), asked.start) == ([3, 4, 5], [8, 9], None)
