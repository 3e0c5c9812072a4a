// What tests/stories/test_other_clients.py runs: the official packages for JavaScript against one server.
import OpenAI from "openai"; import Anthropic from "@anthropic-ai/sdk"; import { Ollama } from "ollama";
const [url, sum, weather, parameters, extract, person, long] = process.argv.slice(2);
const schema = JSON.parse(parameters); const form = JSON.parse(person); const user = (content) => [{role: "user", content}];
const openai = new OpenAI({baseURL: url + "/v1", apiKey: "none", maxRetries: 0});
const found = {};
found.openai = (await openai.chat.completions.create({model: "chat", messages: user(sum), temperature: 0})).choices[0].message.content;
let text = "";
for await (const chunk of await openai.chat.completions.create({model: "chat", messages: user(sum), temperature: 0, stream: true}))
  text += chunk.choices[0]?.delta?.content ?? "";
found.openaiStream = text;
const tools = [{type: "function", function: {name: "get_weather", parameters: schema}}];
const called = await openai.chat.completions.create({model: "chat", messages: user(weather), tools, temperature: 0});
found.openaiTool = JSON.parse(called.choices[0].message.tool_calls[0].function.arguments);
found.openaiError = await openai.chat.completions.create({model: "llama", messages: user("hi")}).catch((e) => e.constructor.name);
found.openaiBadRequest = await openai.chat.completions.create({model: "chat", messages: user("hi"), temperature: 9})
  .catch((e) => e.constructor.name);
found.openaiForm = JSON.parse((await openai.chat.completions.create({model: "chat", messages: user(extract), temperature: 0,
  response_format: {type: "json_schema", json_schema: {name: "person", schema: form, strict: true}}})).choices[0].message.content);
found.openaiAdapter = (await openai.chat.completions.create({model: "chat", messages: user(sum), temperature: 0,
  adapter_name: "pirate"})).choices[0].message.content;
for await (const chunk of await openai.chat.completions.create({model: "chat", messages: user(long), stream: true})) break;
found.responses = (await openai.responses.create({model: "chat", input: sum, temperature: 0})).output_text;
const anthropic = new Anthropic({baseURL: url, apiKey: "none", maxRetries: 0});
const stream = anthropic.messages.stream({model: "chat", max_tokens: 99, messages: user(weather),
  tools: [{name: "get_weather", input_schema: schema}]});
found.anthropicTool = (await stream.finalMessage()).content.find((block) => block.type === "tool_use")?.input;
found.anthropicError = await anthropic.messages.create({model: "llama", max_tokens: 9, messages: user("hi")})
  .catch((e) => e.constructor.name);
found.anthropicAdapter = (await anthropic.messages.create({model: "chat:shout", max_tokens: 99, messages: user(sum), temperature: 0}))
  .content[0].text;
for await (const event of await anthropic.messages.create({model: "chat", max_tokens: 900, messages: user(long), stream: true})) break;
const ollama = new Ollama({host: url}); text = "";
for await (const part of await ollama.chat({model: "chat", messages: user(sum), options: {temperature: 0}, stream: true}))
  text += part.message.content;
found.ollamaStream = text;
found.ollamaTool = (await ollama.chat({model: "chat", messages: user(weather), tools, options: {temperature: 0}}))
  .message.tool_calls[0].function.arguments;
found.ollamaForm = JSON.parse((await ollama.chat({model: "chat", messages: user(extract), options: {temperature: 0}, format: form}))
  .message.content);
found.ollamaError = await ollama.chat({model: "llama", messages: user("hi")}).catch((e) => e.name);
const leaving = await ollama.chat({model: "chat", messages: user(long), stream: true});
for await (const part of leaving) { leaving.abort(); break; }
found.ollamaModels = (await ollama.list()).models.map((model) => model.name);
console.log(JSON.stringify(found));
