// The official npm client: URL NODE_MODULES. Prints what it made of the answers as JSON.
import { createRequire } from "node:module";

const [url, modules] = process.argv.slice(2);
const OpenAI = createRequire(`${modules}/`)("openai");
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Tell me a story about a mouse." }];
const options = { model: "demo", messages, max_tokens: 20, temperature: 0 };

const whole = await client.chat.completions.create(options);
let streamed = "";
let usage = null;
const stream = await client.chat.completions.create({
  ...options,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
const plain = await client.completions.create({ model: "demo", prompt: "Once upon a time", max_tokens: 8, temperature: 0 });
let refusal = null;
try {
  await client.chat.completions.create({ ...options, temperature: 1000 });
} catch (error) {
  refusal = { status: error.status, param: error.param };
}
const models = (await client.models.list()).data.map((model) => model.id);
console.log(
  JSON.stringify({
    whole: whole.choices[0].message.content,
    streamed,
    tokens: [whole.usage.completion_tokens, usage.completion_tokens],
    plain: plain.choices[0].text,
    refusal,
    models,
  }),
);
