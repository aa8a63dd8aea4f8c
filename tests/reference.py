"""Guidance computed the plain way: a full forward over `prefix + candidate` for every candidate."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Reference:
    """A base model and value models in transformers, without caches or batches."""

    def __init__(self, base_model, value_models: Sequence[str]) -> None:
        from transformers import AutoModelForCausalLM

        from trimtab.plugins import MAVISValueModel

        self.base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32).eval()
        self.values = [MAVISValueModel.load(str(path)).eval() for path in value_models]

    @torch.no_grad()
    def distribution(
        self,
        prefix: Sequence[int],
        weights: Sequence[float],
        beta: float,
        top_k: int,
        masked: Sequence[int] = (),
    ) -> dict[int, float]:
        """Probability of every candidate under the guided policy, in float64 arithmetic."""
        logits = self.base(torch.tensor([list(prefix)])).logits[0, -1].double()
        logits[list(masked)] = -torch.inf
        top, candidates = logits.topk(top_k)
        continued = torch.cat(
            (torch.tensor([list(prefix)]).expand(top_k, -1), candidates[:, None]), dim=1
        )
        values = torch.cat(
            [
                self.head_values(model, prefix, candidates)
                if model.config.head_type == "hidden"
                else model(continued).logits[:, -1]
                for model in self.values
            ],
            dim=1,
        )
        score = top + beta * (values.double() @ torch.tensor(weights, dtype=torch.float64))
        return dict(zip(candidates.tolist(), torch.softmax(score, 0).tolist()))

    def head_values(self, model, prefix: Sequence[int], candidates: torch.Tensor) -> torch.Tensor:
        """`<U_i(h(s)), P(e(a))> + b_i(e(a))` from the saved weights and table, in float64."""
        w = {name: weight.double() for name, weight in model.state_dict().items()}

        output = self.base(torch.tensor([list(prefix)]), output_hidden_states=True)
        hidden = output.hidden_states[-1][0, -1].double()  # after the final norm
        hidden = (hidden - w["hidden_mean"]) / w["hidden_std"]
        actions, rank = w["action_table"][candidates], model.config.action_rank
        width, members = model.config.head_width, model.config.ensemble_size
        total = actions[:, members * rank :].clone()
        for member in range(members):
            own = slice(member * width, (member + 1) * width)
            inner = w["query.expand.weight"][own] @ hidden + w["query.expand.bias"][own]
            inner = torch.nn.functional.gelu(inner)
            query = inner @ w["query.weight"][member] + w["query.bias"][member]
            factors = actions[:, member * rank : (member + 1) * rank]
            total += factors @ query.view(-1, rank).T  # the table holds a share of P
        return total

    @torch.no_grad()
    def greedy(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        weights: Sequence[float],
        beta: float,
        top_k: int,
        eos: int | None = None,
    ) -> list[int]:
        """The guided greedy response; it ends with `eos` if it reaches it."""
        tokens = list(prompt)
        for _ in range(max_tokens):
            policy = self.distribution(tokens, weights, beta, top_k)
            tokens.append(max(policy, key=policy.__getitem__))
            if tokens[-1] == eos:
                break
        return tokens[len(prompt) :]
