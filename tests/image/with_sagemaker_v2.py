"""HuggingFaceModel's local mode with our image, run by the Python that has sagemaker 2: IMAGE MODEL_DIRECTORY PORT."""

import json
import sys

from sagemaker.huggingface import HuggingFaceModel
from sagemaker.local import LocalSession


def main():
    image, model, port = sys.argv[1:]
    session = LocalSession()
    session.config = {"local": {"serving_port": int(port)}}
    deployed = HuggingFaceModel(
        image_uri=image,
        role="arn:aws:iam::111122223333:role/none",
        model_data=f"file://{model}",
        code_location="s3://unused/unused",  # or a bucket's name is asked for
        env={"OMP_WAIT_POLICY": "passive", "KV_CACHE_MEMORY": "16MiB"},
        sagemaker_session=session,
    )
    predictor = deployed.deploy(1, "local", wait=False)  # wait=True sleeps 30 s
    try:
        asked = {"inputs": "Hello", "parameters": {"max_new_tokens": 4, "ignore_eos": True}}
        sys.stdout.write(json.dumps(predictor.predict(asked)) + "\n")
    finally:
        predictor.delete_endpoint()


main()
