"""The dialects of HTTP: TGI's own, OpenAI's and SageMaker's, over one `Inference`."""
