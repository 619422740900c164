"""Compares llama.cpp's greedy text with ours, by hand: llama.cpp is not among the packages of the tests.

    pip install xllamacpp                            llama.cpp as a package
    python sample.py --init_from=out/mine/export --prompts=prompts.txt --temperature=0 --dtype=float32 --output=ours.jsonl
    python tests/llama_cpp.py out/mine/export/model.gguf ours.jsonl

The run was exported with --llama_cpp=FOLDER. Of a chat model, `--chat` instead of ours.jsonl prints llama.cpp's answers to the
lines of standard input, by the template in the file.
"""

import json
import sys

import xllamacpp


def main(model: str, ours: str) -> None:
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = model, 0, 1
    params.sampling.temp, params.verbosity = 0.0, -1
    server = xllamacpp.Server(params)
    if ours == "--chat":
        messages = []
        for line in sys.stdin:
            messages.append({"role": "user", "content": line.strip()})
            answer = server.handle_chat_completions({"messages": messages, "max_tokens": 60, "temperature": 0})
            messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
            print(f"user> {line.strip()}\nassistant> {messages[-1]['content']}")
        return
    equal = total = 0
    for row in map(json.loads, open(ours, encoding="utf-8")):
        wanted, size = row["completion"], row["tokens"]
        answer = server.handle_completions({"prompt": row["prompt"], "max_tokens": size, "temperature": 0})
        found = answer["choices"][0]["text"]
        same = next((n for n, (a, b) in enumerate(zip(found, wanted)) if a != b), min(len(found), len(wanted)))
        equal, total = equal + (found == wanted), total + 1
        if found != wanted:
            print(
                f"{row['prompt']!r}: equal up to character {same} of {len(wanted)}\n  {wanted[same : same + 60]!r}\n  {found[same : same + 60]!r}"
            )
    print(f"{model}: {equal} of {total} texts equal")


if __name__ == "__main__":
    main(*sys.argv[1:3])
