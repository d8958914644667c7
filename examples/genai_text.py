"""Text in, text out with onnxruntime-genai, which has the tokenizer, the cache and the search.

    sparamx-onnx convert llama/ -o llama-sparse/ --attention fast
    python examples/genai_text.py llama-sparse/ "Once upon a time" --new-tokens 50

Nothing here is about sparse weights: genai_config.json in the folder names the library that lies beside it.
"""

from __future__ import annotations

import argparse

import onnxruntime_genai


def main() -> None:
    parser = argparse.ArgumentParser(description="Continues a text.")
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("text", metavar="TEXT")
    parser.add_argument("--new-tokens", type=int, default=50)
    arguments = parser.parse_args()
    model = onnxruntime_genai.Model(arguments.folder)
    tokenizer = onnxruntime_genai.Tokenizer(model)
    prompt = tokenizer.encode(arguments.text)
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + arguments.new_tokens, do_sample=False)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    print(arguments.text + tokenizer.decode(generator.get_sequence(0)[len(prompt) :]))


if __name__ == "__main__":
    main()
