"""Small vocabularies, trained once for all tests of the inputs."""

import pytest
import tokenizers

from tests.tools.vocabularies import train_pieces, write


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Byte-level BPE, no bos, three control tokens, a post-processor that would trim spaces."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.normalizer = tokenizers.normalizers.NFC()
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_end|>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["USER: what is this? ASSISTANT: a red dog on a mat"] * 9, trainer)
    model.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    model.enable_truncation(
        8
    )  # as some published files have these two; a loader that obeys would cut, or fill
    model.enable_padding(length=64)
    return write(
        tmp_path_factory.mktemp("tiny"), model, eos_token="<|endoftext|>", pad_token="<|im_end|>"
    )


@pytest.fixture(scope="session")
def piece_model():
    return train_pieces()


@pytest.fixture(scope="session")
def llama_json():
    """A tokenizer.json as Llama-2's: a Prepend normalizer makes the word mark."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    model.train_from_iterator(["the dog sat on a mat, say </s>"] * 9, trainer)
    model.pre_tokenizer = None
    steps = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    model.normalizer = tokenizers.normalizers.Sequence(steps)
    return model
