"""Text as documents for a model: files, rows and conversations, their tokens, and which of them count.

    corpus = Corpus(TextData(paths=("corpus/",)), *load_tokenizer("models/teacher"))
    for example in corpus:  # streamed: nothing is held but a window
        ...

`TextData` and `Example` need torch alone; `Corpus` and what else lies here is imported from its module: it needs `tokenizers`.
"""

from kdfast.text.example import IGNORE, Example
from kdfast.text.spec import TextData

__all__ = ["IGNORE", "Example", "TextData"]
