# The code in /home/code on PyTorch's official CUDA image; setup-docker.sh mounts the data at /home/data.
ARG BASE=pytorch/pytorch:2.11.0-cuda12.8-cudnn9-runtime
FROM ${BASE}

# What torch.compile needs on a GPU: a C compiler and Python's headers.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev python3-dev \
    && rm -rf /var/lib/apt/lists/*

# The requirements first: a change of the code leaves this layer as it is. torch and torchvision are the image's own.
COPY requirements.txt code/requirements-extra.txt /home/
RUN PIP_BREAK_SYSTEM_PACKAGES=1 pip install --no-cache-dir -r /home/requirements.txt -r /home/requirements-extra.txt

# What matplotlib knows of fonts, found once; whoever runs the image may write there.
ENV MPLCONFIGDIR=/home/matplotlib
RUN python3 -c 'import matplotlib.font_manager' && chmod -R a+rwX /home/matplotlib

COPY code /home/code
WORKDIR /home/code
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

ENTRYPOINT ["python3", "cli.py"]
CMD ["train"]
