"""More facts about serving: the words a newcomer meets around prefill and decode."""

from __future__ import annotations

from deploy.demo.facts import Topic

FACTS_MORE: dict[str, Topic] = {
    "latency": Topic(
        terms=("latency", "serving latency"),
        asks=("why is the answer slow", "how long does an answer take"),
        answers=(
            "Latency is the time a user has to wait. In serving, it has two parts: the time to the first "
            "token and the time between the tokens that follow.",
        ),
    ),
    "throughput": Topic(
        terms=("throughput", "serving throughput", "tokens per second"),
        asks=("how is throughput measured", "how many tokens per second is good"),
        answers=(
            "Throughput is how much work a server gets done in a given time. For language models, it is "
            "often counted in tokens per second.",
        ),
        more="Larger batches give more throughput, but each user may wait a little longer.",
    ),
    "goodput": Topic(
        terms=("goodput",),
        asks=("what does goodput mean", "how is goodput different from throughput"),
        answers=(
            "Goodput counts only the requests that were answered within their time limits. A server with "
            "high throughput can still have low goodput.",
        ),
    ),
    "batching": Topic(
        terms=("batching", "a batch", "continuous batching", "dynamic batching"),
        asks=("why do servers use batches", "why batch requests", "how does continuous batching work"),
        answers=(
            "Batching means that the model works on many requests in one step. With continuous batching, "
            "new requests join and finished ones leave after every step.",
        ),
        more="Batching helps decode most, because the weights are read once for all requests in the batch.",
    ),
    "attention": Topic(
        terms=("attention", "self-attention", "an attention layer"),
        asks=("what does attention do", "how does attention use the kv cache"),
        answers=(
            "Attention lets each token look at the tokens before it. It compares a query with the keys of "
            "those tokens and mixes their values.",
        ),
        more="The keys and values of earlier tokens are kept in the KV cache.",
    ),
    "transformer": Topic(
        terms=("a transformer", "the transformer", "a transformer model"),
        asks=("how is a transformer built",),
        answers=(
            "A transformer is a model made of layers of attention and small neural networks. Most language "
            "models of today are transformers.",
        ),
        more="I am a transformer too, but a very small one with five layers.",
    ),
    "llm": Topic(
        terms=("an llm", "llms", "a language model", "a large language model", "language models"),
        asks=("what does llm stand for", "how do llms work", "how does a language model work"),
        answers=(
            "A large language model is a neural network that writes text. It guesses the next token again "
            "and again until the answer is done.",
        ),
        more="I am a language model too, but a very small one.",
    ),
    "serving": Topic(
        terms=(
            "serving", "llm serving", "inference", "model serving", "an inference server", "llm inference",
        ),
        asks=("what does it mean to serve a model", "how is a model served"),
        answers=(
            "Serving means running a trained model so that users can send prompts and get answers. It has "
            "two phases, called prefill and decode.",
        ),
        more="A good server keeps many users happy at once with little waiting.",
    ),
    "prompt": Topic(
        terms=("a prompt", "prompts", "an input prompt"),
        asks=("what should i write in a prompt",),
        answers=(
            "A prompt is the text that you send to the model. The prefill phase reads it before the first "
            "token of the answer comes.",
        ),
    ),
    "pages": Topic(
        terms=(
            "a paged kv cache", "paged attention", "a page in the kv cache", "a kv block", "kv cache blocks",
        ),
        asks=("why is the kv cache split into pages", "why are there pages in the kv cache"),
        answers=(
            "A paged KV cache is cut into small blocks of the same size. A request takes a new block only "
            "when it needs one, so little memory is wasted.",
        ),
    ),
    "prefix": Topic(
        terms=("prefix caching", "a prefix cache", "prompt caching"),
        asks=("can two requests share a kv cache", "how does prefix caching help"),
        answers=(
            "Prefix caching keeps the KV cache of the start of a prompt. When another request begins with "
            "the same text, that part does not have to be computed again.",
        ),
        more="It helps most in long chats and with long system prompts.",
    ),
    "chunked": Topic(
        terms=("chunked prefill", "a prefill chunk"),
        asks=("why cut a prompt into chunks", "how does chunked prefill work"),
        answers=(
            "Chunked prefill cuts a long prompt into pieces and reads them one after another. Other "
            "requests can take their turn between the pieces.",
        ),
    ),
    "temperature": Topic(
        terms=("temperature", "the temperature", "sampling temperature"),
        asks=(
            "what does the temperature do", "what happens if i raise the temperature",
            "which temperature should i use",
        ),
        answers=(
            "Temperature says how bold the model is when it picks the next token. At zero it always takes "
            "the most likely token, and at higher values it takes more risks.",
        ),
    ),
    "sampling": Topic(
        terms=("sampling", "greedy decoding", "greedy sampling", "top-p", "top-k", "top p sampling"),
        asks=("how does the model pick the next token", "how is the next token chosen"),
        answers=(
            "Sampling is how the next token is picked. Greedy decoding takes the most likely one, while "
            "top-k and top-p draw by chance from the best few.",
        ),
    ),
    "streaming": Topic(
        terms=("streaming", "token streaming", "a streamed answer"),
        asks=("why does the text appear bit by bit", "why do the words come one by one"),
        answers=(
            "Streaming sends each token to the user as soon as it is ready. You can start to read while "
            "decode is still at work.",
        ),
    ),
    "gpu": Topic(
        terms=("a gpu", "gpus", "gpu memory"),
        asks=("why do we need gpus", "why are gpus used for serving", "do i need a gpu"),
        answers=(
            "A GPU is a chip that does many small calculations at the same time. Large language models run "
            "on GPUs because both prefill and decode need fast calculations and fast memory.",
        ),
        more="I am so small that I can run without a GPU.",
    ),
    "context": Topic(
        terms=("the context window", "a context window", "context length", "the context length"),
        asks=("how long can a prompt be", "how much text can you read", "what is your context length"),
        answers=(
            "The context window is the number of tokens that a model can look at in one go. Mine is 2048 "
            "tokens, but I learned from shorter texts.",
        ),
    ),
    "eos": Topic(
        terms=("an eos token", "the end-of-text token", "a stop token", "eos"),
        asks=("how does the model know when to stop", "when does the answer end", "when do you stop writing"),
        answers=(
            "A model stops when it produces a special end token or when it reaches the limit of tokens. The "
            "end token is not shown to the user.",
        ),
    ),
    "weights": Topic(
        terms=("weights", "model weights", "parameters", "a parameter"),
        asks=("what are weights made of", "how many parameters do models have"),
        answers=(
            "Weights are the numbers that a model learned in training. They stay the same for all users "
            "while the model is being served.",
        ),
    ),
    "scheduler": Topic(
        terms=("a scheduler", "the scheduler", "scheduling", "a request queue"),
        asks=("who decides which request runs next", "why do requests wait in a queue"),
        answers=(
            "A scheduler decides which requests run in the next step. It has to be fair to the users and "
            "keep the workers busy.",
        ),
    ),
    "router": Topic(
        terms=("a router", "the router", "load balancing", "a load balancer"),
        asks=("what does a router do", "how are requests spread over workers"),
        answers=(
            "A router takes in the requests and sends each one to a worker. A good router spreads the work "
            "so that no worker has to wait.",
        ),
    ),
    "compute_bound": Topic(
        terms=("compute-bound work",),
        asks=(
            "why is prefill compute bound", "what limits prefill", "why is prefill limited by compute",
            "why does prefill need so much computing", "why is prefill slow",
        ),
        answers=(
            "Prefill works on all the tokens of the prompt at once. Every weight is used for many tokens, "
            "so the speed of the calculation sets the limit.",
        ),
    ),
    "memory_bound": Topic(
        terms=("memory-bound work", "memory bandwidth"),
        asks=(
            "why is decode memory bound", "what limits decode", "why is decode limited by memory",
            "why does decode need fast memory", "why is decode slow",
        ),
        answers=(
            "Decode works on only one new token for each request. It must read all the weights and the KV "
            "cache for that, so the speed of the memory sets the limit.",
        ),
    ),
    "quantization": Topic(
        terms=("quantization", "a quantized model", "bf16", "fp8"),
        asks=("why store weights in fewer bits",),
        answers=(
            "Quantization stores numbers in fewer bits. The model takes less memory and runs faster, but it "
            "may become a little less exact.",
        ),
    ),
    "tensor_parallel": Topic(
        terms=("tensor parallelism", "tensor parallel"),
        asks=("how can a model run on several gpus", "how do you split a model over gpus"),
        answers=(
            "Tensor parallelism splits each layer of a model over several GPUs. Each GPU does a part of the "
            "work, and then they put the results together.",
        ),
    ),
    "speculative": Topic(
        terms=("speculative decoding",),
        asks=("how can decode be made faster", "what is a draft model"),
        answers=(
            "In speculative decoding, a small model guesses a few tokens, and the large model checks them "
            "all in one step. The right guesses save time.",
        ),
    ),
}  # fmt: skip
