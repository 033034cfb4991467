"""Generate from model directories: `python -m splitfl.demo.sample PROMPT MAX_NEW_TOKENS DIRECTORY ...`.

Prints a JSON list with one continuation a directory. Plain transformers in a process of its own: anybody who loads the
directory without splitfl gets the same.
"""

import json
import sys


def main(prompt: str, max_new_tokens: int, directories: list[str]) -> list[str]:
    """Return the greedy continuation of a prompt by each model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = []
    for directory in directories:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory)
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        tokens = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.1,
            pad_token_id=tokenizer.eos_token_id,
        )
        texts.append(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])) + "\n")
