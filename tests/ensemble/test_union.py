"""What tokens stand for, and the union of several tokenizers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixed import CORPUS, TEXTS, strings, tokenizers
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from hf_spec_ensemble.ensemble.spelling import spelling_of
from hf_spec_ensemble.ensemble.union import Vocabulary, union_of


def vocabularies(order=(0, 1, 2)) -> tuple[Vocabulary, ...]:
    made = [tokenizers()[i] for i in order]
    return tuple(Vocabulary(spelling_of(t), len(t), (t.eos_token_id,)) for t in made)


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[EOS]")


@pytest.mark.parametrize("i", range(3))
def test_strings_are_what_tokens_decode_to(i):
    tokenizer = tokenizers()[i]
    assert spelling_of(tokenizer).strings == strings(tokenizer)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(spelling_of(tokenizer).strings[t] for t in ids).decode() == text


@pytest.mark.parametrize("i", range(3))
@given(data=st.one_of(st.binary(min_size=1, max_size=12), st.text(min_size=1, max_size=8).map(str.encode)))
def test_any_bytes_are_written_and_mean_the_same(i, data):
    spelling = spelling_of(tokenizers()[i])
    assert spelling.spells(list(spelling.write(data)), data)


@pytest.mark.parametrize("i", range(3))
def test_text_is_written_as_the_tokenizer_writes_it(i):
    tokenizer = tokenizers()[i]
    for text in [*TEXTS, " question", "dé", "  x", "\n\n"]:
        if text.encode() not in spelling_of(tokenizer).by_string:
            assert list(spelling_of(tokenizer).write(text.encode())) == tokenizer.encode(text, add_special_tokens=False)


def test_what_a_tokenizer_was_called_with_does_not_matter():
    """A call leaves its padding and truncation on the tokenizer."""
    made = []
    for call in (None, dict(padding="max_length", max_length=32), dict(truncation=True, max_length=1)):
        tokenizer = Tokenizer(kinds.BPE())
        split = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(list(split)), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(CORPUS, trainer)
        made.append(PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="!"))
        if call:
            made[-1](["several words", "x"], **call)
    text = "\n\n    return question"
    written = [spelling_of(one).write(text.encode()) for one in made]
    assert written[0] == written[1] == written[2] == tuple(made[0].encode(text))


def test_tokens_that_a_model_does_not_know_are_not_there():
    tokenizer = tokenizers()[0]
    whole = spelling_of(tokenizer)
    size = len(whole.tokens) - 20
    part = spelling_of(tokenizer, size)
    texts = [string for string, i in whole.by_string.items() if i >= size]
    assert len(texts) == 20 and len(part.tokens) == size
    for text in texts:
        assert len(part.write(text)) > 1 and max(part.write(text)) < size and part.spells(list(part.write(text)), text)


def test_a_space_that_a_tokenizer_puts_before_texts_is_not_written():
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5, "▁a": 6, "c": 7}
    tokenizer = Tokenizer(kinds.BPE(vocabulary, [("▁", "a")], unk_token="<unk>"))

    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    assert fast.encode("ab", add_special_tokens=False) == [6, 5]
    spelling = spelling_of(fast)
    assert spelling.write(b"ab") == (4, 5)
    assert spelling.write(b" ab") == (6, 5)


def test_word_pieces():
    vocabulary = {"[UNK]": 0, "[EOS]": 1, "good": 2, "##ness": 3, "##n": 4, "g": 5, ",": 6}
    tokenizer = Tokenizer(kinds.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    spelling = spelling_of(_fast(tokenizer))
    assert spelling.strings[2:] == [b" good", b"ness", b"n", b" g", b","]
    assert spelling.write(b" goodness") == (2, 3)
    assert spelling.write(b"nness") == (4, 3)
    assert spelling.write(b"?") == (0,)
    assert spelling.write(b",") == (6,) and spelling.write(b" good, good??ness") == (2, 6, 2, 0, 3)


def test_tokenizers_whose_bytes_are_not_known_are_refused():
    with pytest.raises(ValueError, match="which bytes"):
        spelling_of(_fast(Tokenizer(kinds.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))))


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 2), (2, 0), (2, 1, 0)])
def test_every_string_is_there_once_behind_the_main_models_ids(order):
    union = union_of(vocabularies(order))
    main, *others = [tokenizers()[i] for i in order]
    assert union.main_width == len(main)
    extra = union.strings[len(main) :]
    assert len(set(extra)) == len(extra) and not set(extra) & set(strings(main))
    assert set(extra) == {s for other in others for s in strings(other) if s} - set(strings(main))
    for u, text in enumerate(union.strings):
        for way in union.maps:
            if u >= len(main) or strings(main)[u] is not None:
                assert way.spelling.spells(list(way.read(u)), text)


@pytest.mark.parametrize("order", [(0, 1), (2, 0), (0, 2)])
def test_probabilities_stay_at_their_strings(order):
    union = union_of(vocabularies(order))
    for way, i in zip(union.maps, order):
        tokenizer = tokenizers()[i]
        logits = torch.randn(2, 3, len(tokenizer), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        mapped, own = way.logits(logits).exp(), logits.exp()
        text = [t for t, string in enumerate(strings(tokenizer)) if string]
        for string in {strings(tokenizer)[t] for t in text}:
            there = [u for u, other in enumerate(union.strings) if other == string]
            mine = [t for t in text if strings(tokenizer)[t] == string]
            torch.testing.assert_close(mapped[..., there].sum(-1), own[..., mine].sum(-1))
        eos = tokenizers()[order[0]].eos_token_id
        torch.testing.assert_close(mapped[..., eos], own[..., tokenizer.eos_token_id])
        assert way.logits(logits.float()).dtype == torch.float32


def test_only_what_all_have_is_left():
    order = (0, 2)
    union = union_of(vocabularies(order), only_common=True)
    shared = set(strings(tokenizers()[0])) & set(strings(tokenizers()[2]))
    eos = tokenizers()[0].eos_token_id
    for i, way in zip(order, union.maps):
        logits = way.logits(torch.zeros(len(tokenizers()[i])))
        finite = logits.isfinite().nonzero()[:, 0].tolist()
        assert union.common.tolist() == finite and eos in finite
        assert {union.strings[u] for u in finite if strings(tokenizers()[0])[u]} == shared - {None}
    assert {bytes([byte]) for byte in range(256)} <= shared  # so that any text can be written


def test_other_ids_for_the_same_strings_cost_no_tokens():
    order = list(torch.randperm(300, generator=torch.Generator().manual_seed(1)))
    state = __import__("json").loads(tokenizers()[0].backend_tokenizer.to_str())
    state["model"]["vocab"] = {token: int(order[i]) for token, i in state["model"]["vocab"].items()}
    for added in state["added_tokens"]:
        added["id"] = int(order[added["id"]])
    permuted = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(__import__("json").dumps(state)),
        pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
    )  # fmt: skip
    both = vocabularies((0,))[0], Vocabulary(spelling_of(permuted), 300, (permuted.eos_token_id,))
    union = union_of(both)
    assert union.width == 300 and union.maps[0].is_identity
    assert [union.maps[1].read(u) for u in range(300)] == [(int(order[u]),) for u in range(300)]


def test_tables_are_kept():
    assert union_of(vocabularies((0, 2))) is union_of(vocabularies((0, 2)))


def test_drafters_add_nothing():
    union = union_of(vocabularies((0, 1, 2)), drafting=frozenset({2}))
    assert union.width == union_of(vocabularies((0, 1))).width
    assert union_of(vocabularies((0, 1, 2)), True, frozenset({2})).common.tolist() == (
        union_of(vocabularies((0, 1)), True).common.tolist()
    )


def test_anothers_padding_is_not_the_end():
    """Not even if the end is called so, and the main model has no padding."""
    vocabulary = {"<end>": 0, "<stop>": 1, "a": 2}

    def made(**roles):
        tokenizer = Tokenizer(kinds.BPE(vocab=vocabulary, merges=[]))
        tokenizer.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)

    main, other = made(eos_token="<end>"), made(eos_token="<stop>", pad_token="<end>")
    sizes = [Vocabulary(spelling_of(one), 3, (one.eos_token_id,)) for one in (main, other)]
    union = union_of(tuple(sizes))
    own = torch.tensor([0.2, 0.5, 0.3]).log()
    assert union.maps[1].logits(own).exp()[:3].tolist() == pytest.approx([0.5, 0.0, 0.3])
    other.pad_token = None  # and then that token is one of this name
    assert spelling_of(other).roles == {"eos": 1}
