"""Text on a terminal, while it is being unmasked."""

import shutil
import sys

from torch import Tensor

from mdm_plugin.models import ChatTokenizer

MASK = "░"


class LiveText:
    """Shows the first row of a batch at each step, over the text of the step before, on stderr.

    Args:
        tokenizer: of the text.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer, self.lines = tokenizer, 0

    def text(self, response: Tensor) -> str:
        """A response [n] with a sign for each token still masked."""
        ids, out, run = response.tolist(), "", []
        for token in [*ids, None]:
            if token is not None and token != self.tokenizer.mask_id:
                if token == self.tokenizer.eos_id:
                    break
                run.append(token)
                continue
            out += self.tokenizer.decode(run) + (MASK if token is not None else "")
            run = []
        return out + self.tokenizer.decode(run)

    def show(self, response: Tensor) -> None:
        """Write the first row of ``response`` [B, n]."""
        width = shutil.get_terminal_size().columns
        shown = [
            line[i : i + width] or " "
            for line in self.text(response[0]).split("\n")
            for i in range(0, max(1, len(line)), width)
        ]
        up = f"\x1b[{self.lines}A\r\x1b[J" if self.lines else ""
        sys.stderr.write(up + "\n".join(shown) + "\n")
        sys.stderr.flush()
        self.lines = len(shown)

    def end(self) -> None:
        """The next batch begins below."""
        self.lines = 0
